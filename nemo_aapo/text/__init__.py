"""How a model is spoken to and where its answers end, by the small files beside its weights. Needs no torch."""
