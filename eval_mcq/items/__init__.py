"""Questions: their schema, where they come from and go to."""
