"""Which backend answers for a model, as a user names it."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from eval_mcq.backends.base import WayName
from eval_mcq.backends.local import LocalModel
from eval_mcq.backends.stock import CONFIG, StockModel, is_stock
from mgll_encoder.common.devices import Precision
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.hub import at_hand

if TYPE_CHECKING:
    from eval_mcq.scoring.prompt import Mode


def backend_here(
    model: str | Path,
    mode: "Mode | Literal['auto']" = "auto",
    *,
    device: str = "auto",
    precision: Precision = "auto",
    load_in_4bit: bool = False,
    engine: WayName = "auto",
) -> "LocalModel | StockModel":
    """Return what answers for a model on this machine: this project's engine, or stock transformers.

    Args:
        model: Model folder, or a hub id, which is read from the cache or downloaded.
        mode: Scoring mode; ``auto`` is ``letters``.
        device: As for `eval_mcq.run`; so are the others.
        precision: Number format.
        load_in_4bit: NF4 weights.
        engine: What is shared between questions.

    Raises:
        UserError: the model does not exist or is not read, or a stock model is to be loaded in 4 bits or with shared
            prefixes.
    """
    folder, chosen = at_hand(model), "letters" if mode == "auto" else mode
    if not is_stock(folder):
        # Before anything is hashed or decoded. A folder without a configuration is an adapter, checked when loaded.
        if (folder / CONFIG).is_file():
            from mllm_adapters import check_mllm

            check_mllm(folder)
        return LocalModel(folder, str(model), chosen, device, precision, load_in_4bit, engine)
    if load_in_4bit:
        raise InvalidArgumentError(
            f"{model} is read by no family of this project: `load_in_4bit` is only for those that are"
        )
    if engine not in ("auto", "plain"):
        raise InvalidArgumentError(
            f"{model} is read by no family of this project, so nothing is shared between its questions: leave "
            f"`engine={engine}` out"
        )
    return StockModel(folder, str(model), chosen, device, precision)
