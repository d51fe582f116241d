"""Errors of a single question in a file: refused, or skipped and counted by reason."""

from collections.abc import Iterator
from contextlib import contextmanager

from mgll_encoder.common.errors import UserError
from mgll_encoder.common.skipped import Skipped

NO_CHOICE = "without options or image"
NO_COLUMN = "without a required column"
BLANK_OPTION = "blank option"
SAME_OPTIONS = "options alike"
NO_ANSWER = "blank answer"
FOREIGN_ANSWER = "answer that is not an option"
SAME_ID = "id used before"
COPIES_DISAGREE = "circular copies disagree"
MALFORMED = "not of the format"


class BadQuestionError(UserError):
    """One question is invalid; the rest of the file is usable.

    Attributes:
        reason: The kind of error, one of this module's constants.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def leaving_out(skipped: Skipped) -> Iterator[None]:
    """Count a question that turns out to be invalid within the block.

    Raises:
        UserError: the question is invalid, and ``skipped`` is strict.
    """
    try:
        yield
    except BadQuestionError as error:
        skipped.add(error.reason, str(error))
