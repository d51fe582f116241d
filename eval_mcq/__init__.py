"""Multiple-choice disease benchmark: questions, scoring, statistics, tables."""
