"""Evaluation of towers: probes, zero-shot classification, retrieval, explanations."""
