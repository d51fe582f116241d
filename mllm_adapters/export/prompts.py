"""A chat template as llama.cpp and Ollama render it.

llama.cpp's server replaces each picture of a message by a marker such as ``<__media_a1b2__>`` and gives the template
plain text (tools/server/server-common.cpp, common/chat.cpp; release b11549). Ollama has templates in Go, and writes the
pictures before the message.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from mgll_encoder.common.chat import render_chat, template_of
from mgll_encoder.common.errors import UnsupportedCheckpointError
from mllm_adapters.export import read_template

_QUESTION, _ANSWER, _NEXT = "\u2983question\u2984", "\u2983answer\u2984", "\u2983next\u2984"


def llama_cpp_template(processor: Any, before: str) -> str:
    """Return a processor's chat template with pictures where llama.cpp marks them.

    Args:
        processor: The processor.
        before: What precedes the whole prompt.
    """
    around = read_template("llama_cpp.jinja").removesuffix("\n")
    own = template_of(processor) or ""
    return (
        around.replace("PLACEHOLDER", processor.image_token)
        .replace("BEFORE", before)
        .replace("TEMPLATE", own.removesuffix("\n"))
    )


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the turns of a conversation.

    Attributes:
        system: Before the first turn.
        user: Before a question.
        assistant: Between question and answer.
        end: After an answer.
        picture: Between a picture and the question.
    """

    system: str
    user: str
    assistant: str
    end: str
    picture: str


def turns_of(processor: Any) -> Turns:
    """Find out what a chat template writes around questions and answers, by rendering it.

    Raises:
        UserError: the template cannot be rendered, or leaves out a turn.
    """
    one = render_chat(processor, [_turn("user", _QUESTION)], add_generation_prompt=True)
    talk = [_turn("user", _QUESTION), _turn("assistant", _ANSWER), _turn("user", _NEXT)]
    three = render_chat(processor, talk, add_generation_prompt=True)
    seen = render_chat(
        processor,
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}],
    )
    try:
        before, after = one.split(_QUESTION)
        between = three.split(_ANSWER)[1].split(_NEXT)[0]
        picture = seen.split(processor.image_token)[1].split(_QUESTION)[0]
    except (ValueError, IndexError):
        raise UnsupportedCheckpointError(
            "the chat template does not render a question, an answer and a picture once each"
        ) from None
    user = before[len(before) - _shared(before, between) :]
    return Turns(before.removesuffix(user), user, after, between.removesuffix(user), picture)


def _shared(one: str, other: str) -> int:
    """Return the number of characters at the end of both texts."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
