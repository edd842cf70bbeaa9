"""The MoE transformer, its parametrization table, and what connects them: a role per tensor."""
