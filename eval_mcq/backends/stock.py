"""Models that no family of this project reads, but stock transformers loads as image-text-to-text."""

import hashlib
import json
import logging
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_mcq.backends.base import Identity
from eval_mcq.backends.fingerprint import code_version, model_fingerprint, package_versions
from eval_mcq.backends.model_folder import ModelFolder
from eval_mcq.records.backend_record import BackendRecord
from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.common.files import sha256
from mgll_encoder.common.texts import read_json, read_text
from mgll_encoder.text.pretrained import asks_for_code, check_configs, check_loading_report, load_pretrained

if TYPE_CHECKING:
    from eval_mcq.scoring.stock import StockScorer

_logger = logging.getLogger(__name__)

CONFIG = "config.json"

TEMPLATES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
"""Files that may contain the chat template, in the order in which transformers looks."""


def is_stock(folder: Path) -> bool:
    """Return whether a folder is a model that transformers loads and no family of this project reads."""
    if not (folder / CONFIG).is_file():
        return False
    from mllm_adapters import base_of_adapter, family_of  # imports torch

    if base_of_adapter(folder) or family_of(folder) is not None:
        return False
    return _class_name(read_json(folder / CONFIG)) is not None


def _class_name(config: dict[str, Any]) -> str | None:
    """Return the class that stock transformers has for a configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(str(config.get("model_type")))


class StockModel(ModelFolder):
    """A folder that stock transformers loads."""

    @cached_property
    def identity(self) -> Identity:
        """What its answers depend on; hashes the folder.

        Raises:
            UserError: the folder names code of its own, or has no chat template.
        """
        from eval_mcq.scoring.stock import STOCK_VERSION

        self._refuse_code()
        config = self.folder / CONFIG
        backend = BackendRecord(
            name="transformers",
            version=version("transformers"),
            sent={
                "scoring": STOCK_VERSION,
                "class": _class_name(read_json(config)),
                "config_sha256": sha256(config),
                "chat_template_sha256": hashlib.sha256(_template(self.folder).encode()).hexdigest(),
            },
        )
        return Identity(
            self.named, model_fingerprint(self.folder), self.number_format, code_version(), package_versions(), backend
        )  # fmt: skip

    def load(self) -> "StockScorer":
        """Load the model.

        Raises:
            UserError: it cannot be loaded, or tensors are missing.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        from eval_mcq.scoring.stock import StockScorer

        self._refuse_code()
        where = self.placement
        _logger.info(f"Loading {self.folder} on {where.device} with stock transformers ...")
        check_configs(self.folder)
        config = load_pretrained(AutoConfig, self.folder, f"{self.folder / CONFIG}", checked=True)
        # mismatched shapes are reported instead of raised, so that the check of the report names the tensor
        model, report = load_pretrained(
            AutoModelForImageTextToText, self.folder, f"the model in {self.folder}", checked=True, config=config,
            dtype=where.dtype, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        check_loading_report(report, self.folder, ("missing_keys", "mismatched_keys"))
        if unused := sorted(report["unexpected_keys"]):
            _logger.warning(
                f"{self.folder}: transformers does not use {len(unused)} of its tensors, first {unused[0]}"
            )
        processor = load_pretrained(
            AutoProcessor, self.folder, f"the processor in {self.folder}", checked=True
        )
        if not hasattr(processor, "tokenizer"):
            raise UnsupportedCheckpointError(
                f"{self.folder}: its files make up a {type(processor).__name__}, expected a processor of images and "
                "text: complete the download"
            )
        return StockScorer(model, processor, where.device, where.dtype, self.mode)

    def _refuse_code(self) -> None:
        if asking := asks_for_code(self.folder):
            file, code = asking
            raise UnsupportedCheckpointError(
                f"{file} names Python code of its own ({code!s:.120}), which is never run; nothing was loaded: take "
                "the folder of this model that transformers reads itself, or serve it and give its `endpoint`"
            )


def _template(folder: Path) -> str:
    """Return the chat template of a folder, as text.

    Raises:
        UserError: it has none.
    """
    for name in TEMPLATES:
        file = folder / name
        if not file.is_file():
            continue
        found = (
            read_text(file, "chat template")
            if file.suffix == ".jinja"
            else read_json(file).get("chat_template")
        )
        if found:
            return found if isinstance(found, str) else json.dumps(found, sort_keys=True)
    raise UnsupportedCheckpointError(
        f"{folder} has no chat template ({', '.join(TEMPLATES)}), so its prompt is not known: add chat_template.jinja"
    )
