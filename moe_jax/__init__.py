"""Mixture-of-experts language models in JAX."""
