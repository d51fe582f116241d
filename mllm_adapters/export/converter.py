"""The language model of a LLaVA through llama.cpp's own converter, convert_hf_to_gguf.py."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from mgll_encoder.common.errors import NotFoundError, UnsupportedCheckpointError
from mllm_adapters.checkpoints.file_copy import check_space
from mllm_adapters.checkpoints.side_files import json_bytes
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import copied
from mllm_adapters.core.streaming import write_safetensors
from mllm_adapters.export.gguf_file import BYTES, Precision
from mllm_adapters.export.source import LlavaSource

OUTPUT_TYPES = {"float32": "f32", "float16": "f16"}

_TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def check_converter(script: Path) -> None:
    """Refuse a path that is not the converter.

    Raises:
        NotFoundError: there is no such file.
    """
    if not script.is_file():
        raise NotFoundError(
            f"`converter={script}` does not exist: name convert_hf_to_gguf.py in a folder with llama.cpp's sources"
        )


@dataclass(frozen=True)
class ConvertedModel:
    """A language model that the converter writes.

    Attributes:
        source: The model.
        template: Its chat template as llama.cpp renders it.
        script: The converter; it runs in this Python, with the packages that it needs.
    """

    source: LlavaSource
    template: str
    script: Path

    def nbytes(self, precision: Precision) -> int:
        """Return the size of the tensors."""
        headers = self.source.language_headers.values()
        return sum(prod(header.shape) for header in headers) * BYTES[precision]

    def write(self, path: Path, precision: Precision, progress: Callable[[int], None]) -> None:
        """Write the file; the converter reads the language model from a temporary folder next to it.

        Raises:
            UserError: the disk is too small for that folder, or the converter fails.
        """
        headers = self.source.language_headers.values()
        check_space(path.parent, sum(prod(header.shape) * header.dtype.itemsize for header in headers))
        with TemporaryDirectory(dir=path.parent) as place:
            folder = Path(place)
            _write_language_model(self.source, self.template, folder)
            command = [sys.executable, str(self.script), str(folder), "--outfile", str(path)]
            options = ["--outtype", OUTPUT_TYPES[precision], "--model-name", self.source.name]
            done = subprocess.run([*command, *options], capture_output=True, text=True)
        if done.returncode or not path.is_file():
            said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
            raise UnsupportedCheckpointError(
                f"{self.script} ended with code {done.returncode} and said: {said[-1]:.300}"
            )
        progress(self.nbytes(precision))


def _write_language_model(source: LlavaSource, template: str, folder: Path) -> None:
    """Write the language model as a folder of transformers, with the tokenizer's files as they are."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = source.config.text_config
    settings = {**text.to_dict(), "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]}
    if "rope_parameters" in settings:
        settings["rope_theta"] = settings["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_bytes(json_bytes(settings))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for pattern in _TOKENIZER:
        for file in source.checkpoint.folder.glob(pattern):
            shutil.copy(file, folder / file.name)
    steps = [
        copied(header, name.replace("language_model.", "model.", 1))
        for name, header in source.language_headers.items()
    ]

    def values() -> Iterator[tuple[Step, Tensor]]:
        for step in steps:
            yield step, source.checkpoint.read(step.sources[0])

    write_safetensors(folder / "model.safetensors", steps, values())
