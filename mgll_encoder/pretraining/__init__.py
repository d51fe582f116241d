"""Training an image tower and a text tower together."""
