"""A small LLaVA on SmolLM2, or on a tiny language model, for experiments without a hub."""
