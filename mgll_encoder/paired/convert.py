"""Writes a tower, alone or with its text tower, as a folder that other libraries read."""

from dataclasses import dataclass
from pathlib import Path

from mgll_encoder.common.errors import unknown_name
from mgll_encoder.common.files import check_free, new_folder
from mgll_encoder.common.trained_on import write_trainings
from mgll_encoder.tower.card import model_card
from mgll_encoder.tower.load import load_tower
from mgll_encoder.tower.model import Tower
from mgll_encoder.tower.save import provenance_of, save_tower, trainings_before
from mgll_encoder.tower.spec import Activation, Pooling
from mgll_encoder.weights.torch_file import WeightSet

VISION = "vision"


@dataclass(frozen=True)
class Conversion:
    """What `convert_tower` did.

    Attributes:
        out: The folder.
        warnings: What the user should know, one sentence each.
    """

    out: Path
    warnings: tuple[str, ...]


def convert_tower(
    path: Path | str,
    out: Path | str,
    *,
    to: str = VISION,
    activation: Activation | None = None,
    weights: WeightSet | None = None,
    image_size: int | None = None,
    pooling: Pooling | None = None,
    force: bool = False,
) -> Conversion:
    """Write a tower as a folder that other libraries read.

    Args:
        path: The tower: anything that `load_tower` reads.
        out: The folder to write.
        to: ``vision`` (the image tower alone, for transformers and all commands), ``clip`` (with its text tower, a
            ``CLIPModel`` of transformers) or ``open-clip`` (the same for open_clip's ``local-dir:``).
        activation: As for `load_tower`.
        weights: As for `load_tower`.
        image_size: As for `load_tower`.
        pooling: As for `load_tower`.
        force: Replace ``out`` if it exists.

    Raises:
        UserError: the tower cannot be read, ``out`` exists, or the tower is not a CLIP with a text tower and ``to``
            needs one.
    """
    path, out = Path(path), Path(out)
    check_free(out, force)
    from mgll_encoder.paired.clip_folders import FORMS

    if to not in (VISION, *FORMS):
        raise unknown_name("`to`", to, (VISION, *FORMS))
    tower = load_tower(path, activation=activation, weights=weights, image_size=image_size, pooling=pooling)
    if to == VISION:
        return Conversion(save_tower(tower, out, force), tower.header.warnings)
    return Conversion(out, (*tower.header.warnings, *_write_both(tower, out, to, force)))


def _write_both(tower: Tower, out: Path, to: str, force: bool) -> list[str]:
    from mgll_encoder.paired.clip_folders import FORMS
    from mgll_encoder.paired.read import text_tower_of
    from mgll_encoder.paired.whole_clip import ALONE, whole_clip

    source, form = tower.header.source, FORMS[to]
    clip = whole_clip(tower, text_tower_of(source, tower, f"; {ALONE}"), source)
    record = provenance_of(tower.header)
    with new_folder(out, force) as folder:
        form.write(clip, folder)
        (folder / "README.md").write_text(model_card(tower.spec, record, form.contents), encoding="utf-8")
        write_trainings(folder, trainings_before(tower.header))
    if not clip.unknown:
        return []
    return [
        f"{clip.unknown} of {len(clip.tokenizer)} pieces of the tokenizer were in no training text and have a zero "
        "embedding in the folder; this project's commands leave them out of a text instead"
    ]
