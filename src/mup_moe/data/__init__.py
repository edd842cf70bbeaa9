"""From documents to tokens: sources of text, the split, the tokenizer, and token files."""
