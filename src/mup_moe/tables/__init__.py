"""The tables that the config alone decides: parametrizations, models, the bill."""
