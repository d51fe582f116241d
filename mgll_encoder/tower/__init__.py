"""The vision tower: its contract, and reading, adapting and saving it."""
