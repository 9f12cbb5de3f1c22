"""Decoding with a mixture of experts: which ones a token goes to, what they make of it, and on which ranks they are."""
