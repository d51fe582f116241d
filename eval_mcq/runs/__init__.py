"""Runs of a benchmark: resumable and sharded."""
