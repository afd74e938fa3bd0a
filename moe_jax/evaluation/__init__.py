"""Measurements of a loaded model: speed now; perplexity and agreement belong here too."""
