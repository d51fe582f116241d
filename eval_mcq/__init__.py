"""Multiple-choice disease benchmark: questions, scoring, statistics, tables."""

from typing import TYPE_CHECKING

from mgll_encoder.common.lazy import lazy

if TYPE_CHECKING:
    __version__: str

__all__: list[str] = []

__getattr__, __dir__ = lazy(__name__, {})
