"""Initial weights of pretraining: new towers, this project's towers, a full CLIP, or a pretrained text encoder."""

import logging
from functools import lru_cache
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError

from mgll_encoder.common.errors import InvalidArgumentError, MismatchError, NotFoundError
from mgll_encoder.data.batches import SplitRows
from mgll_encoder.paired.read import paired_text_tower
from mgll_encoder.pretraining.dual_encoder import TowerSize, TwoTowers, image_projection, new_tower
from mgll_encoder.pretraining.losses import Alphas
from mgll_encoder.text.text_tower import TextTower
from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.tower.load import load_tower
from mgll_encoder.tower.model import Tower
from mgll_encoder.tower.spec import Activation, Pooling
from mgll_encoder.weights.torch_file import WeightSet

_logger = logging.getLogger(__name__)

OPENAI = "openai"
"""Value of ``--init`` for OpenAI's CLIP ViT-L/14."""
AUTO, NEW = "auto", "new"
"""Values of ``--text-tower``: that of ``--init`` if it has one, else a new one; or always a new one."""


def starting_towers(
    size: TowerSize,
    init: str | None,
    activation: Activation | None,
    text_tower: str,
    plan: SplitRows,
    alphas: Alphas,
    freeze_text: bool = False,
    weights: WeightSet | None = None,
    image_size: int | None = None,
    pooling: Pooling | None = None,
    train_blocks: int | None = None,
) -> TwoTowers:
    """Create the towers as they are before the first step.

    Args:
        size: Geometry of new towers.
        init: None for new ones, ``OPENAI``, or anything that ``load_tower`` reads.
        activation: Activation of ``init``, if it does not specify it.
        text_tower: ``AUTO``, ``NEW``, or a transformers folder or hub id of a text encoder.
        plan: The training rows, whose texts define the vocabulary of a new text tower.
        alphas: Weights of the loss terms.
        freeze_text: Train only the projection of the text tower.
        weights: ``raw`` or ``ema``, if ``init`` has both.
        image_size: Image size in pixels that ``init`` is trained at; None for its own.
        pooling: Pooling of the image features of ``init``, see `TowerSpec`; None for its own.
        train_blocks: Train only this many of the last blocks of the image tower, and what follows them; 0 for the
            projections and the text tower alone; None for all.

    Raises:
        UserError: a new text tower is to be frozen, ``train_blocks`` is not a number of blocks, weights cannot be read
            or downloaded, or the text tower of ``init`` lacks words of the texts.
    """
    given, activation = _openai(activation) if init == OPENAI else (init, activation)
    vision = new_tower(size)
    if given:
        vision = load_tower(
            given, activation=activation, weights=weights, image_size=image_size, pooling=pooling
        )
    if train_blocks is not None:
        _freeze_first(vision, train_blocks)
    path = vision.header.source if given else None
    for line in vision.header.warnings:
        _logger.warning(line)
    projection = image_projection(vision)
    text = _text(text_tower, path, vision, projection.out_features, plan)
    if text is None and freeze_text:
        raise InvalidArgumentError(
            "`freeze_text=True`: the text tower is new and must be trained; leave it out, or name a trained one with "
            "`text_tower`"
        )
    if text is None:
        text = TextTower.new(plan.all_texts(), size.text_width, size.text_depth, projection.out_features)
    if freeze_text:
        text.freeze()
    return TwoTowers(vision, projection, text, alphas)


def _freeze_first(vision: Tower, trained: int) -> None:
    """Freeze the embeddings and all blocks but the last ``trained`` ones; what follows the blocks is trained.

    With 0 the whole tower is frozen.

    Raises:
        UserError: the tower does not have as many blocks.
    """
    depth = vision.spec.depth
    if not 0 <= trained <= depth:
        raise InvalidArgumentError(
            f"`train_blocks` is {trained}: the image tower has {depth} blocks: give a number from 0 to {depth}"
        )
    first = f"{ARCHITECTURES[vision.spec.architecture].blocks}.{depth - trained}."
    for name, parameter in vision.model.named_parameters():  # in the order of the computation
        if name.startswith(first):
            break
        parameter.requires_grad_(False)


def _openai(activation: Activation | None) -> tuple[Path, Activation]:
    """Return OpenAI's weights, from open_clip's cache or the hub; they were trained with QuickGELU."""
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    try:
        file = download_pretrained(get_pretrained_cfg("ViT-L-14", OPENAI))
    except (OSError, RuntimeError, HfHubHTTPError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise NotFoundError(
            f"`init={OPENAI}`: the weights of CLIP ViT-L/14 cannot be downloaded ({first}): connect to the internet, "
            "or give a file or folder with them, such as `init=ViT-L-14.pt`"
        ) from None
    return Path(file), activation or "quick_gelu"


def _text(choice: str, path: Path | None, vision: Tower, shared: int, plan: SplitRows) -> TextTower | None:
    """Return the requested text tower; None for a new one."""
    if choice == NEW or (choice == AUTO and path is None):
        return None
    if choice != AUTO:
        return TextTower.pretrained(choice, shared)
    assert path is not None  # the first case
    text = paired_text_tower(path, vision, shared)
    if text is None:
        _logger.info(f"{path} has no text tower: a new one is trained")
    else:
        _check_known(text, plan)
    return text


def _check_known(text: TextTower, plan: SplitRows) -> None:
    """Refuse texts with words that a text tower with a reduced vocabulary would ignore."""
    if text.rows >= len(text.tokenizer):
        return
    unknown = lru_cache(maxsize=2**16)(lambda sentence: tuple(text.unknown(sentence)))
    for sentence in plan.all_texts():
        if pieces := unknown(sentence):
            raise MismatchError(
                f"the text tower of `init` has no embedding for {', '.join(pieces[:5])} in '{sentence[:80]}', a text "
                f"of {plan.path}: train another one with `text_tower={NEW}`"
            )
