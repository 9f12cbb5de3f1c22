"""Hugging Face model directories as files: checked, read and written without building a model."""
