"""BLIP-2's Q-Former: its first stage over transformers' classes, its tokenizer, and reading LAVIS's weights."""
