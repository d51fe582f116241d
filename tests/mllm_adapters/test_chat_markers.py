"""Chat templates mark the assistant's answers (``{% generation %}``) where this project's own labels are."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.families import read_template
from mllm_adapters.families.internvl.text import FORMATS, _template
from tests.builders import rendered
from tests.mllm_adapters.test_chat import TEMPLATES

WRITTEN = {name: read_template(name) for name in TEMPLATES} | {
    f"internvl {name}": _template(form) for name, form in FORMATS.items()
}
IMAGES = ("<|image_pad|>", "<image_placeholder>", "<IMG_CONTEXT>", "<imgpad>", "<image>")
WORDS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = Conversation.model_validate(
    {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhich disease?"},
            {"from": "gpt", "value": "Glaucoma.\n"},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": " Yes, “quite” {{ x }}"},
        ],
    }
)


def marked(template: str, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """What transformers renders, and the spans that it takes for the assistant's."""
    (text,), (spans,) = render_jinja_template(
        conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **WORDS
    )
    return text, spans


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_marked_is_what_is_learnt_from(name: str) -> None:
    template = WRITTEN[name]
    tokenizer = SimpleNamespace(special_tokens_map=WORDS)
    image = next(token for token in IMAGES if token in template)
    ours = rendered(TALK, SimpleNamespace(chat_template=template, tokenizer=tokenizer, image_token=image))
    text, spans = marked(template, TALK.messages())
    assert text == ours.text
    assert spans == list(ours.answers)
    assert all(
        said.strip() in text[slice(*span)] for said, span in zip(("Glaucoma.", "{{ x }}"), spans, strict=True)
    )
    assert "disease" not in "".join(text[slice(*span)] for span in spans)
