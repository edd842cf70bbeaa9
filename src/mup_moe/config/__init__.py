"""What the user asks for: reads config.yaml into settings and cells."""
