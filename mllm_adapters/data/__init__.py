"""Training data: from files of several formats to rendered, counted and encoded examples."""
