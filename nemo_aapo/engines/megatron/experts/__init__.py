"""Decoding with a mixture of experts: which experts a token goes to, what they make of it, and whose experts they are."""
