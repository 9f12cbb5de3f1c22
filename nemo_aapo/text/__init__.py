"""How a model is spoken to, where its completions end and which part is the answer. Needs no torch."""
