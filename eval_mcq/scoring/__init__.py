"""Prompts, scoring and answer parsing."""
