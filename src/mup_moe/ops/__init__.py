"""Operations: keeps a run alive and its files whole. Nothing here changes a number."""
