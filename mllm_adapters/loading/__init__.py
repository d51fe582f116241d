"""Loads checkpoints of all families: original layouts, deltas, adapters."""
