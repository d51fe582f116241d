"""One module per family: the rows of the contract test."""
