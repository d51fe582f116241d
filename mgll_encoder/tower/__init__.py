"""The vision tower: its specification, and reading, adapting and saving it."""
