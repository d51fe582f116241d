"""The text tower: encoder, tokenizer, pooling."""
