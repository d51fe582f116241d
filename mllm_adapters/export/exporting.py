"""Writes a LLaVA for llama.cpp and Ollama: two GGUF files, a Modelfile, and a page on what llama.cpp does otherwise."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import unknown_name
from mgll_encoder.common.files import new_folder
from mgll_encoder.common.progress import counting
from mgll_encoder.tower.architectures import first_patch
from mllm_adapters.checkpoints.file_copy import check_space
from mllm_adapters.export.converter import ConvertedModel, check_converter
from mllm_adapters.export.gguf_file import PRECISIONS, GGUFFile, Precision
from mllm_adapters.export.language import language_file
from mllm_adapters.export.pages import modelfile, readme
from mllm_adapters.export.prompts import Turns, llama_cpp_template, turns_of
from mllm_adapters.export.source import LlavaSource, open_llava
from mllm_adapters.export.vision import vision_file
from mllm_adapters.export.vocabulary import Vocabulary
from mllm_adapters.swap.writer import check_output

MODEL, MMPROJ = "model.gguf", "mmproj.gguf"

CLASS_TOKEN = (
    "llama.cpp puts a tower's class token after the patches, but numbers positions and features as if it came first "
    "(its issue 25814, still so in release b11549): features are off by one patch, and answers differ. SigLIP towers "
    "have no class token and are not affected"
)

RESIZE = {
    "squash": "llama.cpp pads an oblong picture to a square, where this model squashes it",
    "crop": "llama.cpp pads an oblong picture to a square, where this model crops it",
    "pad": "llama.cpp resizes an oblong picture and then pads it, where this model pads first",
}
"""Resize rule -> what llama.cpp does otherwise."""


@dataclass(frozen=True)
class GGUFExport:
    """A planned export.

    Attributes:
        source: The model.
        language: Its language model.
        vision: Its tower and projector.
        turns: What its chat template writes around turns.
        precision: Dtype of matrices.
    """

    source: LlavaSource
    language: GGUFFile | ConvertedModel
    vision: GGUFFile
    turns: Turns
    precision: Precision

    @property
    def sizes(self) -> dict[str, int]:
        """Return the files with weights and their sizes in bytes."""
        return {MODEL: self.language.nbytes(self.precision), MMPROJ: self.vision.nbytes(self.precision)}

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what llama.cpp does otherwise than transformers."""
        tower = self.source.tower
        own_size = f"{RESIZE[tower.resize]}: give it pictures of {tower.image_size}x{tower.image_size} pixels"
        return (*self.source.notes, *([CLASS_TOKEN] if first_patch(tower) else []), own_size)

    def write(self, out: str | Path, *, force: bool = False) -> Path:
        """Write the folder; it appears when it is complete.

        Args:
            out: Folder to write.
            force: Replace it if it exists.

        Raises:
            UserError: ``out`` is taken or holds the model, the disk is too small, a value does not fit into the
                precision, or llama.cpp's converter fails.
        """
        out = Path(out)
        check_output(out, force, [self.source.checkpoint.folder])
        total = sum(self.sizes.values())
        with new_folder(out, force) as folder:
            check_space(folder, total)
            with counting("Writing", total, in_bytes=True) as advance:
                self.language.write(folder / MODEL, self.precision, advance)
                self.vision.write(folder / MMPROJ, self.precision, advance)
            page = readme(self.source.name, self.source.tower.image_size, self.turns.picture, self.notes)
            (folder / "Modelfile").write_text(modelfile(self.turns, MODEL, MMPROJ), encoding="utf-8")
            (folder / "README.md").write_text(page, encoding="utf-8")
        return out


def plan(folder: Path, precision: str, converter: Path | None) -> GGUFExport:
    """Plan an export; arguments and errors as in `mllm_adapters.plan_gguf`."""
    if precision not in PRECISIONS:
        raise unknown_name("`precision`", precision, PRECISIONS)
    if converter is not None:
        check_converter(converter)
    source = open_llava(folder)
    vision = vision_file(source)
    turns = turns_of(source.processor)
    language, turns = _converted(source, turns, converter) if converter else _written(source, turns)
    return GGUFExport(source, language, vision, turns, precision)


def _converted(source: LlavaSource, turns: Turns, converter: Path) -> tuple[ConvertedModel, Turns]:
    return ConvertedModel(source, llama_cpp_template(source.processor, ""), converter), turns


def _written(source: LlavaSource, turns: Turns) -> tuple[GGUFFile, Turns]:
    rows: Any = source.config.text_config.vocab_size
    vocabulary = Vocabulary(source.processor.tokenizer, rows, str(source.checkpoint.folder))
    space = vocabulary.space_before(turns.system + turns.user)
    template = llama_cpp_template(source.processor, space)
    turns = replace(turns, system=space + turns.system)
    return language_file(source, {**vocabulary.fields(), "tokenizer.chat_template": template}), turns
