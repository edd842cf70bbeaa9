"""Applies the parametrization table to your own model: any `torch.nn.Module`, with a role per parameter."""
