"""Progress bars of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_library_bars() -> Iterator[None]:
    """Hide transformers' bars over the files of a model; ours, or none, are shown instead."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
