"""Deltas: the tensors of a swapped checkpoint that its base does not have."""

from pathlib import Path

from mllm_adapters.api.swaps import Parts
from mllm_adapters.checkpoints.locate import check_delta, check_swapped
from mllm_adapters.core.hub_resolve import check_name, resolve


def compose(
    delta: str | Path,
    out: str | Path,
    *,
    mllm: str | Path | None = None,
    encoder: str | Path | None = None,
    parts: Parts | None = None,
    copy: bool = False,
    force: bool = False,
) -> Path:
    """Write the full checkpoint that a delta and its base define.

    Args:
        delta: Folder of `SwapPlan.write_delta` or `extract`.
        out: Folder to write.
        mllm: The base (folder, hub id or family name); found by name and hash next to the delta if None.
        encoder: The tower of a delta that only refers to it; found by name and hash if None.
        parts: Paths of parts of the base that are not next to it, name -> path.
        copy: Copy unchanged files instead of hard-linking them.
        force: Replace ``out`` if it exists.

    Raises:
        UserError: the delta is damaged, its base or its encoder is missing or a different one, or ``out`` is taken.
    """
    check_delta(Path(delta))
    if mllm is not None:
        check_name(str(mllm))
    from mllm_adapters.loading.delta import ENCODER_PART, open_delta
    from mllm_adapters.swap import delta_files
    from mllm_adapters.swap.writer import check_output

    check_output(Path(out), force, [Path(delta)])
    given = {**(parts or {}), **({} if encoder is None else {ENCODER_PART: Path(encoder)})}
    opened = open_delta(Path(delta), None if mllm is None else resolve(str(mllm)), given)
    return delta_files.compose(opened, Path(out), force=force, copy=copy)


def extract(
    folder: str | Path,
    mllm: str | Path,
    out: str | Path,
    *,
    parts: Parts | None = None,
    reference_tower: bool = False,
    force: bool = False,
) -> Path:
    """Extract a delta from a swapped checkpoint, retrained or not. All other tensors are compared with the base.

    Args:
        folder: The swapped checkpoint.
        mllm: Its base (folder, hub id or family name).
        out: Folder to write.
        parts: Paths of parts of the base that are not next to it, name -> path.
        reference_tower: Refer to the tower by its hashes instead of storing it, unless it was trained.
        force: Replace ``out`` if it exists.

    Raises:
        UserError: ``mllm`` is not its base, other tensors than those of a swap or training differ from the base's, or
            ``out`` is taken.
    """
    check_swapped(Path(folder))
    check_name(str(mllm))
    from mllm_adapters.swap import delta_files
    from mllm_adapters.swap.writer import check_output

    check_output(Path(out), force, [Path(folder)])
    return delta_files.extract(
        Path(folder), resolve(str(mllm)), Path(out), parts=parts, reference_tower=reference_tower, force=force
    )
