"""Multimodal LLM families behind one contract: read, swap the vision tower, train."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_adapters.loading import load_mllm

__all__ = ["load_mllm"]


def __getattr__(name: str) -> Any:
    """Import on use, so that ``--help`` does not wait for torch."""
    if name in __all__:
        from mllm_adapters import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
