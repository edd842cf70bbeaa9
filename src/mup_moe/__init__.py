"""mup-moe: a reproducible replication of *mu-Parametrization for Mixture of Experts*."""

__version__ = "0.8.0"
