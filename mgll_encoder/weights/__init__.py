"""Weight files: detecting their format, locating their tensors, and reading them without running any code."""
