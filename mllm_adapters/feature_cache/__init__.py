"""What a frozen tower sees, computed once and kept."""
