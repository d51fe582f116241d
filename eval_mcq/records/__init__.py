"""What a run leaves on disk, and in what order a benchmark is asked."""
