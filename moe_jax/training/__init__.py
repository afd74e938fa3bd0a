"""Training: text, batches, losses and the training loop."""
