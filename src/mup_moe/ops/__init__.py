"""What keeps a run alive and its files whole; nothing here changes a number."""
