"""The MoE transformer, and the roles of its tensors, which connect it to the parametrization table."""
