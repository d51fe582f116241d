"""Measuring towers: probes, zero-shot classification, retrieval, explanations."""
