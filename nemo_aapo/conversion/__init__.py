"""Hugging Face and Megatron models as files: converted both ways, looked at without loading, verified to be equal."""
