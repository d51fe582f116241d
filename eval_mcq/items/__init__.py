"""Questions: their schema, how they are built, read and written."""
