"""The parts of a Flamingo outside its weight file: the frozen LLaMA and the frozen CLIP tower."""

from pathlib import Path

from pydantic import BaseModel

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import BadDataError, MismatchError, NotFoundError, UserError
from mgll_encoder.common.texts import read_json
from mgll_encoder.tower.architectures.clip import PROJECTION
from mgll_encoder.tower.examine import OFFICIAL
from mgll_encoder.tower.keymap import plan_keys
from mgll_encoder.weights.keytable import Destination
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Dropped
from mllm_adapters.core.host_tower import TOWER_PART, HostTower, clip_tower
from mllm_adapters.core.known_towers import PUBLISHED_TOWERS, assumed_geometry, gone
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import copied, extended, replaced
from mllm_adapters.core.registry import LOOSE_SUFFIXES
from mllm_adapters.families.keytable import placed
from mllm_adapters.families.med_flamingo.original import HEAD, LANGUAGE_MODEL, Geometry, Names

LANGUAGE_PART = "language-model"
LANGUAGE_HUB_IDS = ("decapoda-research/llama-7b-hf", "huggyllama/llama-7b")
"""Hub ids of LLaMA-7B: the name in med-flamingo's demo, and a copy with a readable tokenizer."""

HOST_TOWER = "openai/clip-vit-large-patch14"
TOWER_NAMES = ("ViT-L-14.pt", "clip/ViT-L-14.pt", HOST_TOWER)

TOWER_PREFIX = "model.vision_tower."


class LlamaFields(BaseModel):
    """The used fields of a LLaMA's config.json."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int


def language_model(checkpoint: Checkpoint) -> Path:
    """Find the LLaMA folder: as given, else the only one next to the weight file or its folder, else in the cache.

    Raises:
        UserError: there is none, there are several, or it is another model.
    """
    nearby: list[Path] = []
    for place in (checkpoint.folder, checkpoint.folder.absolute().parent):
        configs = sorted(place.glob("*/config.json"))
        nearby = nearby or [config.parent for config in configs if _model_type(config.parent) == "llama"]
    found = checkpoint.find(LANGUAGE_PART, *map(str, nearby), *LANGUAGE_HUB_IDS)
    option = f"`parts['{LANGUAGE_PART}']=FOLDER`"
    if found is None:
        raise NotFoundError(
            f"{checkpoint.files[0]} has only the weights trained on top of a LLaMA, but no folder with a "
            f"LLaMA's config.json is next to it, nor is {LANGUAGE_HUB_IDS[-1]} in the Hugging Face cache: "
            f"pass LLaMA-7B as {option}"
        )
    if found in nearby[:1] and len(nearby) > 1:
        names = " and ".join(folder.name for folder in nearby)
        raise NotFoundError(f"{found.parent}: {names} are LLaMAs: say which one it is with {option}")
    if not (found / "config.json").is_file() or _model_type(found) != "llama":
        raise BadDataError(
            f"{found} is not a LLaMA: expected a folder with a config.json of model_type 'llama' ({option})"
        )
    return found


def _model_type(folder: Path) -> str:
    return str(read_json(folder / "config.json").get("model_type"))


def check_language_model(geometry: Geometry, fields: LlamaFields, folder: Path, where: str) -> None:
    """Refuse a LLaMA that is not the base of the weight file.

    Raises:
        UserError: it is not the base.
    """
    vocabulary, width = fields.vocab_size, fields.hidden_size
    if geometry.text_width != width or geometry.rows - vocabulary not in (2, 3):
        raise MismatchError(
            f"{where} was trained on a LLaMA of width {geometry.text_width} with {geometry.rows} tokens, three of "
            f"them added, but {folder} has width {width} and {vocabulary} tokens: give the right one with "
            f"`parts['{LANGUAGE_PART}']=FOLDER`"
        )


def frozen_steps(
    checkpoint: Checkpoint, folder: Path, names: Names, geometry: Geometry, *, tied: bool
) -> list[Step]:
    """Return steps for the frozen tensors of the language model, which the weight file lacks."""
    if f"{LANGUAGE_MODEL}norm.weight" in names.found:
        return []  # a file of the whole model
    steps = []
    for key, header in checkpoint.attach(LANGUAGE_PART, folder).items():
        name = key if key == HEAD else LANGUAGE_MODEL + key.removeprefix("model.")
        if key.endswith("rotary_emb.inv_freq") or name in names.found or (tied and name == HEAD):
            continue
        if not key.startswith(("model.", HEAD)):
            raise BadDataError(f"{header.file}: tensor {key} is not part of a LLaMA")
        steps.append(copied(header, name))
    return extended(steps, (HEAD,), geometry.rows)


def host_tower(
    checkpoint: Checkpoint,
    names: Names,
    geometry: Geometry,
    tower: TowerHeader | None,
    image_size: int | None,
) -> HostTower:
    """Find the checkpoint's CLIP: in the weight file, else next to it, else the published one, if it will be replaced.

    Args:
        checkpoint: The weight file.
        names: Its tensors.
        geometry: Their geometry.
        tower: The new tower, if any.
        image_size: Requested input side in pixels.

    Raises:
        UserError: it is needed but missing, or the width of its features is not the perceiver's.
    """
    if names.vision:
        file = checkpoint.tensors[names.vision[0]].file
        spec = clip_tower(file, activation="quick_gelu").spec
        host = HostTower(file.name, spec, None, (f"the host's own tower is in {file.name}",))
    else:
        host = _external_host(checkpoint, geometry, tower, image_size)
    if host.spec.width != geometry.width:
        raise MismatchError(
            f"{checkpoint.files[0]}: the perceiver reads features of width {geometry.width}, but {host.name} gives "
            f"{host.spec.width}: tower and perceiver do not belong together"
        )
    return host


def _external_host(
    checkpoint: Checkpoint, geometry: Geometry, tower: TowerHeader | None, image_size: int | None
) -> HostTower:
    nearby = [path for path in _towers_nearby(checkpoint) if tower is None or path != tower.source]
    # A CLIP that will be replaced need not be readable: OpenAI's own file is a TorchScript archive.
    found = checkpoint.find(TOWER_PART, *map(str, nearby), *(TOWER_NAMES if tower is None else ()))
    if found is None:
        if tower is not None:
            return _replaced_host(checkpoint, geometry.width, image_size)
        _name_damaged(checkpoint)
        raise NotFoundError(
            f"{checkpoint.files[0]} has no vision tower, and no CLIP file is next to it: pass OpenAI's "
            f"ViT-L/14, as state dict or transformers folder, as `parts['{TOWER_PART}']=PATH`"
        )
    if found in nearby[:1] and len(nearby) > 1:
        listed = " and ".join(path.name for path in nearby)
        raise NotFoundError(
            f"{checkpoint.folder}: {listed} are CLIP towers: say which one it is with `parts['{TOWER_PART}']=PATH`"
        )
    header = clip_tower(found)
    if header.activation_source == "default":
        header = clip_tower(found, activation="quick_gelu")  # open_clip forced it on OpenAI's weights
    spec = header.spec.model_copy(update={"resize": "crop"})
    return HostTower(found.name, spec, header, (f"the host's own tower is {found.name}",))


def _replaced_host(checkpoint: Checkpoint, width: int, image_size: int | None) -> HostTower:
    """Return the published CLIP or, if the perceiver has another width, a tower of which only the width is known."""
    published = PUBLISHED_TOWERS[HOST_TOWER]
    if width == published.width:
        source = f"that of {HOST_TOWER}, which a perceiver of width {width} was published with"
        return HostTower(HOST_TOWER, published, None, (gone(HOST_TOWER, source),))
    if image_size is None:
        _name_damaged(checkpoint)
        raise NotFoundError(
            f"{checkpoint.files[0]} has no vision tower, and its perceiver has width {width}, unlike "
            f"{HOST_TOWER}: a swap needs the old tower's size, pass `image_size`; or pass "
            f"`parts['{TOWER_PART}']=PATH`"
        )
    source = f"taken as {width} wide (perceiver) at {image_size} px"
    return HostTower("CLIP", assumed_geometry(width, image_size), None, (gone("CLIP", source),))


def _name_damaged(checkpoint: Checkpoint) -> None:
    """Report the error of a CLIP folder that was skipped."""
    for folder in _clip_folders(checkpoint):
        clip_tower(folder)


def _towers_nearby(checkpoint: Checkpoint) -> list[Path]:
    """Find CLIP files and folders in the checkpoint's folder by their keys, except MGLL training checkpoints."""
    folders = _folders(checkpoint)
    models = [folder for folder in folders if (folder / "config.json").is_file()]
    loose = [
        path
        for folder in (checkpoint.folder, *(f for f in folders if f not in models))
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in LOOSE_SUFFIXES and path not in checkpoint.files
    ]
    found = []
    for path in (*_clip_folders(checkpoint), *loose):
        try:
            header = clip_tower(path)
        except UserError:
            continue  # not a tower
        if header.layout != OFFICIAL:
            found.append(path)
    return found


def _folders(checkpoint: Checkpoint) -> list[Path]:
    return [path for path in sorted(checkpoint.folder.iterdir()) if path.is_dir()]


def _clip_folders(checkpoint: Checkpoint) -> list[Path]:
    """Find the folders in the checkpoint's folder whose config.json is a CLIP's."""
    models = (folder for folder in _folders(checkpoint) if (folder / "config.json").is_file())
    return [folder for folder in models if _model_type(folder).startswith("clip")]


def inner_tower(checkpoint: Checkpoint, names: Names, *, swapped: bool) -> tuple[list[Step], list[Dropped]]:
    """Return steps for a vision tower in the weight file itself, and the dropped tensors of its CLIP.

    Args:
        checkpoint: The weight file.
        names: Its tensors.
        swapped: Whether another tower replaces it, so that all of it is dropped.
    """
    if swapped or not names.vision:
        return [], list(replaced(names.vision))
    plan = plan_keys(names.vision, str(checkpoint.folder))
    steps: list[Step] = []
    unused = [name for name in names.vision if name not in plan.taken]
    for source, place in plan.taken.items():
        if PROJECTION in place.targets:
            unused.append(source)
        else:
            here = Destination(place.rule, tuple(TOWER_PREFIX + name for name in place.targets))
            steps += placed(checkpoint.tensors[source], here)
    return steps, [Dropped(name=name, reason="not part of the vision tower") for name in unused]
