"""From answers to figures, and from figures to tables."""
