"""Reads traces, never the engine."""
