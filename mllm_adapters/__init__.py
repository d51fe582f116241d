"""Multimodal LLM families behind one contract: read, swap the vision tower, train."""
