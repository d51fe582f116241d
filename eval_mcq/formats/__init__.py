"""Import and export of questions in other tools' formats."""
