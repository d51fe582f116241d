"""Training data: reads files of several formats into rendered, counted and encoded examples."""
