"""What happens from outside to the long commands, and what is left of their work then; see ``__main__``."""
