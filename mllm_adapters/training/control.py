"""The control arm: the same training of the unswapped model, to separate the tower's gain from the training's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import InvalidArgumentError, MismatchError
from mgll_encoder.common.texts import read_json
from mllm_adapters.core.configs import build_config
from mllm_adapters.core.processing import load_processor
from mllm_adapters.core.provenance import named
from mllm_adapters.data.corpus import read_corpus
from mllm_adapters.data.dataset import prepare_examples
from mllm_adapters.training.engine import RECORD
from mllm_adapters.training.prepare import check_source
from mllm_adapters.training.recipe import Recipe


def control_folder(out: Path) -> Path:
    """Return the folder of an output's control."""
    return out.with_name(f"{out.name}-control")


def control_record(out: Path, model: Path, control: Path | None) -> dict[str, Any]:
    """Return how both records refer to each other; empty if there is no control."""
    if control is None:
        return {}
    return {
        "arms": {
            "swapped": {"model": named(model, {}).name, "out": out.name},
            "control": {"model": named(control, {}).name, "out": control_folder(out).name},
        }
    }


def finished(out: Path, model: Path) -> bool:
    """Whether ``out`` is the result of training ``model``."""
    record = out / RECORD
    return record.is_file() and read_json(record).get("source") == named(model, {}).name


def check_control(
    model: Path, control: Path, data: Sequence[Path], images: Path | None, recipe: Recipe
) -> None:
    """Check that both arms can be trained on the same rows.

    Raises:
        UserError: they are the same model, one of them cannot be trained, or a row is too long for only one.
    """
    if model.resolve() == control.resolve():
        raise InvalidArgumentError(f"`control={control}` is the model itself: pass the unswapped checkpoint")
    corpus = read_corpus(data, images, recipe.rows)
    kept = []
    for source in (model, control):
        checkpoint = check_source(source)
        text = build_config(checkpoint.config, f"{source}/config.json").get_text_config()
        longest = min(recipe.max_length, getattr(text, "max_position_embeddings", recipe.max_length))
        examples, counts = prepare_examples(corpus, load_processor(source), longest, text_only=True)
        kept.append([(example.images, len(example.answers)) for example in examples])
    if kept[0] != kept[1]:
        raise MismatchError(
            f"`control`: the arms would see different data: of {counts.rows} rows {len(kept[0])} are short enough for "
            f"{model} and {len(kept[1])} for {control}; raise `max_length`, or leave the long rows out of {corpus.path}"
        )
