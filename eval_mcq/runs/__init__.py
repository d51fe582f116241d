"""Runs of a bench: resumable, divisible, never mixed."""
