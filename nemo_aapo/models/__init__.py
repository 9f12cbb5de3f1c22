"""A Hugging Face model directory as files: checked, read, and written."""
