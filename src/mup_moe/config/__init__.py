"""What the user asks for: settings, cells, and the reading of config.yaml."""
