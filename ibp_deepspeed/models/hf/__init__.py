"""Between Hugging Face folders and pipeline layers."""
