"""Executing, checking and undoing a plan: everything that writes or compares checkpoint folders."""
