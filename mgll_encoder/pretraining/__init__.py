"""Joint training of an image tower and a text tower."""
