"""Conversations in the model's own words, and where its answers stand in them."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from mgll_encoder.common.chat import TemplateError, render_chat, template_of
from mgll_encoder.common.errors import BadDataError
from mllm_adapters.data.llava_format import ROLES, Conversation

MARK = "<the system turn>"
"""What stands for a system turn when one looks whether a template writes it."""


@dataclass(frozen=True, slots=True)
class Example:
    """A rendered conversation.

    Attributes:
        images: Paths below the image folder, in the order of their placeholders.
        text: The rendered text; one placeholder per image.
        answers: Where the assistant's answers stand in ``text``, each with its end-of-turn token.
    """

    images: tuple[str, ...]
    text: str
    answers: tuple[tuple[int, int], ...]


def check_processor(processor: Any) -> None:
    """See to it that training examples can be made with this processor.

    Raises:
        UserError: there is none, it has no chat template, it writes text that its chat template does not, or its
            tokenizer gives no character offsets.
    """
    if processor is None:
        raise BadDataError(
            "the model folder holds no tokenizer, so text cannot be read: add its processor files"
        )
    if template_of(processor) is None:
        raise BadDataError(
            "the model's processor has no chat template: add chat_template.jinja to its folder"
        )
    if getattr(processor, "use_default_system_prompt", False):  # of Janus: it would shift the labels
        raise BadDataError(
            "the model's processor puts a system prompt before what its chat template writes: set "
            "use_default_system_prompt to false in processor_config.json, and write the prompt into the template"
        )
    if not processor.tokenizer.is_fast:
        raise BadDataError("the model's tokenizer gives no character offsets: add its tokenizer.json")


def render(conversation: Conversation, processor: Any) -> Example:
    """Render a conversation and find its answers, by rendering every prompt that precedes one.

    An answer begins where the generation prompt ends, and ends with what the template puts after it, trailing
    white space excepted.

    Raises:
        UserError: a prompt is no prefix of the whole (a template that rewrites history), the template has no place
            for the system turn, or does not place the images.
    """
    messages = conversation.messages()
    text = render_chat(processor, messages)
    if conversation.system is not None:
        _check_system(conversation, messages, text, processor)
    answers: list[tuple[int, int]] = []
    for index in range(len(messages) - len(conversation.turns) + 1, len(messages), 2):
        prompt = render_chat(processor, messages[:index], add_generation_prompt=True)
        answered = render_chat(processor, messages[: index + 1])
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise BadDataError(
                "the model's chat template cannot be used for training: the prompt of answer "
                f"{len(answers) + 1} (id {conversation.id!r}) is not what the whole conversation begins with"
            )
        answers.append((len(prompt), len(answered.rstrip())))
    placeholders = text.count(processor.image_token)
    if placeholders != len(conversation.images):
        raise BadDataError(
            f"id {conversation.id!r} has {len(conversation.images)} images, its rendered text {placeholders} "
            f"{processor.image_token}: the chat template must write one per image, and the data none"
        )
    return Example(conversation.images, text, tuple(answers))


def _check_system(
    conversation: Conversation, messages: list[dict[str, Any]], written: str, processor: Any
) -> None:
    """Refuse a system turn that the template drops, or takes for a turn of somebody else."""
    system, *rest = messages
    taken_for = [role for role in ROLES.values() if _written_alike(system, rest, role, written, processor)]
    # Its own words may come again in a turn.
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
    except TemplateError:  # a template that insists on the order of roles
        return False


def adds_special_tokens(text: str, processor: Any) -> bool:
    """Whether the tokenizer must add its own: not where the template has written the first one already."""
    first = processor.tokenizer.bos_token
    return not (first and text.startswith(first))


def image_tokens(size: tuple[int, int], processor: Any) -> int:
    """How many tokens an image of this size becomes, by asking the processor."""
    blank = Image.new("RGB", size)
    features = processor(text=[processor.image_token], images=[blank], add_special_tokens=False)
    return len(features["input_ids"][0])
