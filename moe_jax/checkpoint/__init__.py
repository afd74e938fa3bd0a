"""Weights on disk: Hugging Face directories in and out."""
