"""Seeing, and changing, what modules of a model are given and what they return."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def hooked(
    modules: "Mapping[str, nn.Module]",
    *,
    before: Callable[[str, tuple[Any, ...]], Any] | None = None,
    after: Callable[[str, Any], Any] | None = None,
) -> Iterator[None]:
    """Call functions whenever modules run within the block; an exception that one raises ends the forward pass.

    Args:
        modules: Name -> module.
        before: Called with a module's name and positional arguments; other arguments may be returned, or None.
        after: Called with a module's name and what it returned; something else may be returned, or None.
    """
    handles = []
    try:
        for name, module in modules.items():
            if before is not None:
                handles.append(
                    module.register_forward_pre_hook(lambda _, given, name=name: before(name, given))
                )
            if after is not None:
                handles.append(
                    module.register_forward_hook(lambda _, __, output, name=name: after(name, output))
                )
        yield
    finally:
        for handle in handles:
            handle.remove()
