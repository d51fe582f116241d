"""Features of a frozen tower, computed once and cached."""
