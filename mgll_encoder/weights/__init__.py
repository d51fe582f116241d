"""Weight files: what a file is, where its tensors are, and reading them without running anything."""
