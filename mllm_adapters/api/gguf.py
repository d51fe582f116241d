"""Files for llama.cpp and Ollama."""

from pathlib import Path
from typing import TYPE_CHECKING

from mgll_encoder.common.extras import require
from mgll_encoder.common.files import optional_path
from mllm_adapters.core.hub_resolve import resolve

if TYPE_CHECKING:
    from mllm_adapters.export.exporting import GGUFExport


def plan_gguf(
    model: str | Path, *, precision: str = "float16", converter: str | Path | None = None
) -> "GGUFExport":
    """Plan to write a LLaVA for llama.cpp and Ollama. Headers are read, and nothing is written.

    Args:
        model: A LLaVA in the transformers layout: a result on LLaVA or LLaVA-Med, or one with ``layout="llava"``. Its
            language model is LLaMA, Mistral, Qwen2 or Qwen3, its tower CLIP or SigLIP.
        precision: Dtype of matrices in the files: ``float16`` or ``float32``.
        converter: llama.cpp's convert_hf_to_gguf.py, to write the language model; None for this project's writer.

    Raises:
        UserError: the model cannot be read, or llama.cpp cannot compute it.

    Example:
        >>> plan = plan_gguf("llava-med-mgll")  # doctest: +SKIP
        >>> print(plan.notes); plan.write("llava-med-mgll-gguf")  # doctest: +SKIP
    """
    require("gguf", "a GGUF file")
    from mllm_adapters.export.exporting import plan

    return plan(resolve(str(model)), precision, optional_path(converter))


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    precision: str = "float16",
    converter: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write a LLaVA for llama.cpp and Ollama: language model, tower with projector, Modelfile, README.

    Args:
        model: As of `plan_gguf`.
        out: Folder to write.
        precision: As of `plan_gguf`.
        converter: Likewise.
        force: Replace ``out`` if it exists.

    Raises:
        UserError: as `plan_gguf`; or ``out`` exists or cannot be written, a value is too large for the precision, or
            the converter fails.
    """
    return plan_gguf(model, precision=precision, converter=converter).write(out, force=force)
