"""Turns documents into tokens: text sources, the split, the tokenizer, and token files."""
