"""A small LLaVA on SmolLM2 or a tiny language model, for experiments without a hub."""
