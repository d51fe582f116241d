"""The files of a run, and the batches of a benchmark."""
