"""Hugging Face <-> Megatron as files: converting, looking without loading, verifying. ``scripts/convert.py`` calls it.

For other parts: ``source.find_source`` tells what a path holds, ``convert.checkpoint_to_hf`` writes the model part of a
checkpoint as a Hugging Face directory, ``megatron_model.load_checkpoint`` reads it into a module.
"""
