"""Conversations rendered with the model's chat template, and the position of its answers in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image

from mgll_encoder.common.chat import TemplateError, render_chat, render_chats, template_of
from mgll_encoder.common.errors import BadDataError
from mllm_adapters.data.llava_format import ROLES, Conversation

MARK = "<the system turn>"
"""Placeholder for a system turn, to check whether a template writes it."""


@dataclass(frozen=True, slots=True)
class Example:
    """A rendered conversation.

    Attributes:
        images: Paths below the image folder, in the order of their placeholders.
        text: The rendered text; one placeholder per image.
        answers: Spans of the assistant's answers in ``text``, each with its end-of-turn token.
    """

    images: tuple[str, ...]
    text: str
    answers: tuple[tuple[int, int], ...]


def check_processor(processor: Any) -> None:
    """Check that training examples can be made with this processor.

    Raises:
        UserError: there is no processor, it has no chat template, it adds text that is not in its chat
            template, or its tokenizer gives no character offsets.
    """
    if processor is None:
        raise BadDataError(
            "the model folder has no tokenizer, so text cannot be read: add its processor files"
        )
    if template_of(processor) is None:
        raise BadDataError(
            "the model's processor has no chat template: add chat_template.jinja to its folder"
        )
    if getattr(processor, "use_default_system_prompt", False):  # Janus: it would shift the labels
        raise BadDataError(
            "the model's processor adds a system prompt before the text of its chat template: set "
            "use_default_system_prompt to false in processor_config.json, and write the prompt into the "
            "template"
        )
    if not processor.tokenizer.is_fast:
        raise BadDataError("the model's tokenizer gives no character offsets: add its tokenizer.json")


def render(conversations: Sequence[Conversation], processor: Any) -> list[Example]:
    """Render conversations and find their answers, by rendering the prompt before each of them.

    An answer begins at the end of the generation prompt, and includes what the template puts after it,
    without trailing white space.

    Raises:
        UserError: a prompt is not a prefix of the whole conversation (a template that rewrites history), or
            the template does not write the system turn or the images.
    """
    chats = [_chats(conversation) for conversation in conversations]
    texts = iter(render_chats(processor, [chat for some in chats for chat in some]))
    return [
        _example(conversation, list(islice(texts, len(some))), processor)
        for conversation, some in zip(conversations, chats, strict=True)
    ]


def _chats(conversation: Conversation) -> list[tuple[list[dict[str, Any]], bool]]:
    """Return the prompt before each answer and the text up to its end; the last one is the whole conversation."""
    messages = conversation.messages()
    answers = range(len(messages) - len(conversation.turns) + 1, len(messages), 2)
    return [chat for index in answers for chat in ((messages[:index], True), (messages[: index + 1], False))]


def _example(conversation: Conversation, texts: Sequence[str], processor: Any) -> Example:
    """Make the example of a conversation from the texts of `_chats`."""
    text = texts[-1]
    if conversation.system is not None:
        _check_system(conversation, conversation.messages(), text, processor)
    answers: list[tuple[int, int]] = []
    for prompt, answered in zip(texts[::2], texts[1::2], strict=True):
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise BadDataError(
                "the model's chat template cannot be used for training: the prompt of answer "
                f"{len(answers) + 1} (id {conversation.id!r}) is not a prefix of the whole conversation"
            )
        answers.append((len(prompt), len(answered.rstrip())))
    placeholders = text.count(processor.image_token)
    if placeholders != len(conversation.images):
        raise BadDataError(
            f"id {conversation.id!r} has {len(conversation.images)} images, but its rendered text has "
            f"{placeholders} {processor.image_token}: the chat template must write one per image, and the "
            "data must contain none"
        )
    return Example(conversation.images, text, tuple(answers))


def _check_system(
    conversation: Conversation, messages: list[dict[str, Any]], written: str, processor: Any
) -> None:
    """Refuse a system turn that the template drops, or writes as a turn of another role."""
    system, *rest = messages
    taken_for = [role for role in ROLES.values() if _written_alike(system, rest, role, written, processor)]
    # Its words may occur in a turn, too.
    marked = {**system, "content": [{"type": "text", "text": MARK}]}
    if taken_for or render_chat(processor, [marked, *rest]).count(MARK) != 1:
        how = f"writes it as a turn of the {taken_for[0]}" if taken_for else "does not write it"
        raise BadDataError(
            f"id {conversation.id!r} has a system turn, and the model's chat template {how}: take the system turns "
            "out of the data, or add them to chat_template.jinja"
        )


def _written_alike(
    system: dict[str, Any], rest: list[dict[str, Any]], role: str, written: str, processor: Any
) -> bool:
    try:
        return bool(render_chat(processor, [{**system, "role": role}, *rest]) == written)
    except TemplateError:  # a template that enforces the order of roles
        return False


def adds_special_tokens(text: str, processor: Any) -> bool:
    """Whether the tokenizer must add special tokens: not if the template has already written the first one."""
    first = processor.tokenizer.bos_token
    return not (first and text.startswith(first))


def image_tokens(size: tuple[int, int], processor: Any) -> int:
    """Ask the processor how many tokens an image of this size becomes."""
    blank = Image.new("RGB", size)
    features = processor(text=[processor.image_token], images=[blank], add_special_tokens=False)
    return len(features["input_ids"][0])
