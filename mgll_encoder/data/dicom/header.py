"""Reading single fields of a DICOM header that may be damaged, empty or of another type than the standard's."""

import math
from collections.abc import Iterable
from typing import Any


class UnusableDicomError(Exception):
    """A DICOM file that is left out.

    Neither text holds a value of the header or a path: both may name the patient.

    Args:
        reason: The kind of trouble; files are counted by it.
        advice: What would help.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


def value(header: Any, name: str) -> Any:
    """A field's value; None where it is missing or empty.

    Raises:
        UnusableError: it cannot be read as what the standard says it is.
    """
    try:
        found = header.get(name)
    except (
        Exception
    ):  # pydicom converts values when they are asked for, and damaged ones raise errors of any kind
        raise UnusableDicomError("damaged header", f"field {name} cannot be read") from None
    return None if found is None or found == "" else found


def numbers(header: Any, name: str) -> list[float]:
    """A field's numbers, NaN for those that are none; empty where there are none."""
    try:
        found = value(header, name)
    except UnusableDicomError:
        return []
    several = isinstance(found, Iterable) and not isinstance(found, (str, bytes))
    return [_number(one) for one in (found if several else [found])] if found is not None else []


def number(header: Any, name: str, default: float) -> float:
    """A field's one number, ``default`` where it is missing or empty.

    Raises:
        UnusableError: it is there and is no finite number.
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
