"""The MGLL vision tower: read it, convert it, train it. Knows nothing of multimodal LLMs."""
