"""Questions from and for other tools: their files in, ours out, and back."""
