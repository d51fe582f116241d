"""One file per architecture; rows in `mllm_adapters.registry`."""
