"""Loading any checkpoint of any family: original layouts, deltas, adapters."""
