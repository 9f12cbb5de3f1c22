"""Megatron-Bridge: its import in parts, the weight map between Hugging Face and Megatron, and LoRA adapters."""
