"""How a sweep stands, told from its files while it runs or afterwards: python -m mup_moe status."""
