"""The parametrization table for a model of your own: any `torch.nn.Module`, with a role per parameter."""
