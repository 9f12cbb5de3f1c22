"""Prompts, their tokenizer, and the order in which a run takes them."""
