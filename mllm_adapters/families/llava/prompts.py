"""Conversation formats of LLaVA in its original layout, which neither config.json nor the weights specify.

A family has a usual format. The first releases have another one, and so do language models whose tokenizer
has another end token. After LLaVA-Med v1.0.0 (llava/conversation.py), HuatuoGPT-Vision 546b25f (cli.py) and
LLaVA-NeXT (llava/conversation.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm_adapters.families import read_template
from mllm_adapters.families.llava.fields import first_release


@dataclass(frozen=True)
class ConversationFormat:
    """A conversation format: its chat template, and its name in a plan."""

    template: str
    title: str


FIRST = ConversationFormat(
    read_template("llava_v0.jinja"), "that of the first releases (Human and Assistant between ###)"
)
"""Format of the releases with a single linear projector."""

BY_END_TOKEN: Mapping[str, ConversationFormat] = {
    "<|endoftext|>": ConversationFormat(
        read_template("huatuo_vision.jinja"), "HuatuoGPT-Vision's (<|user|>, <|assistant|>)"
    ),
    "<|im_end|>": ConversationFormat(read_template("llava_chatml.jinja"), "ChatML, as in LLaVA-NeXT"),
}
"""End token of a tokenizer -> the format with this end token; ``</s>`` (LLaMA, Mistral) is in the usual one."""


def prompt_template(config: Mapping[str, Any], tokenizer: Any, usual: str) -> str:
    """Return the chat template of an original checkpoint.

    Args:
        config: Its config.json.
        tokenizer: Its tokenizer.
        usual: The chat template of its family.
    """
    unusual = _unusual(config, tokenizer)
    return unusual.template if unusual else usual


def prompt_note(config: Mapping[str, Any], tokenizer: Any | None) -> tuple[str, ...]:
    """Return a plan's note about a format other than the family's usual one; empty without a tokenizer."""
    unusual = _unusual(config, tokenizer) if tokenizer is not None else None
    if unusual is None:
        return ()
    return (
        f"the prompt is {unusual.title}; config.json does not record whether a fine-tune used another one: "
        "if so, edit chat_template.jinja",
    )


def _unusual(config: Mapping[str, Any], tokenizer: Any) -> ConversationFormat | None:
    return FIRST if first_release(config) else BY_END_TOKEN.get(str(tokenizer.eos_token))
