"""Experts off the device, and the machinery that brings them there in time under a byte budget."""
