"""The family contract, plans and their operations, and the registry of families."""
