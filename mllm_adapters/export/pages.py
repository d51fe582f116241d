"""The texts next to exported files: Ollama's Modelfile, and a page for people."""

from collections.abc import Sequence

from mllm_adapters.export.prompts import Turns

ROUNDING = (
    "llama.cpp computes GELU in its tanh form and from a table in half precision, and the tower's attention in half "
    "precision unless it is started with `--flash-attn off`; log-probabilities differ by less than 0.02"
)


def modelfile(turns: Turns, model: str, mmproj: str) -> str:
    """Return a Modelfile of Ollama.

    Args:
        turns: What the chat template writes around turns.
        model: File of the language model.
        mmproj: File of tower and projector.
    """
    template = (
        f"{{{{ .System }}}}{turns.user}{{{{ .Prompt }}}}{turns.assistant}{{{{ .Response }}}}{turns.end}"
    )
    system = f'SYSTEM """{turns.system}"""\n' if turns.system else ""
    return f'FROM ./{model}\nFROM ./{mmproj}\nTEMPLATE """{template}"""\n{system}PARAMETER temperature 0\n'


def readme(name: str, side: int, picture: str, notes: Sequence[str]) -> str:
    """Return the page of an exported folder.

    Args:
        name: Name of the model.
        side: Side of the tower's input in pixels.
        picture: What the chat template writes between a picture and a question.
        notes: What llama.cpp does otherwise than transformers.
    """
    differences = "\n".join(f"* {note}." for note in (*notes, ROUNDING))
    between = f", so begin each question with {picture!r}" if picture else ""
    return f"""# {name} for llama.cpp and Ollama

| file | content |
|---|---|
| model.gguf | language model, tokenizer and chat template |
| mmproj.gguf | vision tower and projector |
| Modelfile | the same for Ollama |

    llama-server --model model.gguf --mmproj mmproj.gguf --jinja
    ollama create {name.lower()} -f Modelfile

The chat template is used with `--jinja` (the default of llama-server). Ollama writes pictures directly before the
question{between}.

## What is different from transformers

{differences}

Pictures of {side}x{side} pixels are used as they are. Written by mgll-mllm; its docs/export.md has figures.
"""
