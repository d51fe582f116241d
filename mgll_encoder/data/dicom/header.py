"""Reading fields of a DICOM header that may be damaged, empty, or of a type that violates the standard."""

import math
from collections.abc import Iterable
from typing import Any


class UnusableDicomError(Exception):
    """A DICOM file must be skipped.

    Neither text contains a header value or a path: both may identify the patient.

    Args:
        reason: The kind of problem; files are counted by it.
        advice: What would help.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


def value(header: Any, name: str) -> Any:
    """Return a field's value; None if it is missing or empty.

    Raises:
        UnusableDicomError: it does not have the type required by the standard.
    """
    try:
        found = header.get(name)
    except Exception:  # pydicom converts values on access, and damaged ones raise errors of any kind
        raise UnusableDicomError("damaged header", f"field {name} cannot be read") from None
    return None if found is None or found == "" else found


def numbers(header: Any, name: str) -> list[float]:
    """Return a field's numbers, NaN for values that are not numbers; empty if the field is missing."""
    try:
        found = value(header, name)
    except UnusableDicomError:
        return []
    several = isinstance(found, Iterable) and not isinstance(found, (str, bytes))
    return [_number(one) for one in (found if several else [found])] if found is not None else []


def number(header: Any, name: str, default: float) -> float:
    """Return a field's single number, ``default`` if it is missing or empty.

    Raises:
        UnusableDicomError: it is not a finite number.
    """
    found = value(header, name)
    if found is None:
        return default
    if not math.isfinite(result := _number(found)):
        raise UnusableDicomError("damaged header", f"field {name} is not a number")
    return result


def _number(found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError, OverflowError):
        return math.nan
