"""Counts of skipped rows, files and images by reason, reported in the same words by every command."""

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import BadDataError, UserError

_logger = logging.getLogger(__name__)

NOT_NAMED = "no image named"
NO_FILE = "no image file"
UNREADABLE = "image unreadable"
NO_LABEL = "no label"
NO_TRUTH = "cell that cannot be read"
UNCERTAIN = "uncertain label"
TWICE = "image listed twice"
DISAGREE = "rows of one image disagree"
"""Reasons shared by several readers."""


def unnamed(error: UserError, path: Path) -> str:
    """Return an error message about an image without its path: file names may identify a patient."""
    said = str(error).removeprefix(f"image {path}").strip(": ")
    return re.sub(r"^\(a link to .*\) does", "does", said)


class Skipped:
    """Rows, files or images that are skipped: counted by reason, with the first of each reason; or refused at once.

    Args:
        strict: Stop at the first instead of counting.
        unit: What is counted, in the plural.
    """

    def __init__(self, strict: bool = False, unit: str = "rows") -> None:
        self._strict, self._unit = strict, unit
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.read = 0
        """Number of units read, skipped or not; the readers increment it."""
        self.uncertain: Counter[str] = Counter()
        """Uncertain cells of label tables, by how they were counted."""

    def add(self, reason: str, detail: str, trouble: bool = True) -> None:
        """Skip one.

        Args:
            reason: The kind of problem, in a few words that follow a number: the key of the count.
            detail: One line that names the file, the row or position, and what was expected. It is shown and may be
                published, so it contains no image name, patient id or other text that may identify a patient.
            trouble: Whether strict mode stops here; False for what is always skipped.

        Raises:
            UserError: in strict mode, with the detail.
        """
        if self._strict and trouble:
            raise BadDataError(detail)
        self.counts[reason] += 1
        self.first.setdefault(reason, detail)

    @property
    def total(self) -> int:
        """Number of skipped units."""
        return self.counts.total()

    def summary(self) -> str:
        """Summarize in one line, such as ``left out 12 of 440 rows: 7 no image file, 5 uncertain label``."""
        if not self.total:
            return ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        among = f"{self.total} of {self.read}" if self.read else str(self.total)
        return f"left out {among} {self._unit}: {reasons}"

    def lines(self) -> list[str]:
        """Return the first of each reason, and the summary."""
        firsts = [f"{reason}, for example: {self.first[reason]}" for reason, _ in self.counts.most_common()]
        return [*firsts, self.summary()] if firsts else []

    def record(self) -> dict[str, Any]:
        """Return for a record: how many were read, how many were skipped by reason, and uncertain cells."""
        uncertain = {"uncertain_cells": dict(self.uncertain)} if self.uncertain else {}
        return {f"{self._unit}_read": self.read, "skipped": dict(self.counts), **uncertain}

    def say(self) -> None:
        """Log what was skipped, the summary last; nothing if nothing was skipped."""
        for line in self.lines():
            _logger.info(line)
