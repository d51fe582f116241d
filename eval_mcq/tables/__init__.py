"""Statistics of answers, and tables."""
