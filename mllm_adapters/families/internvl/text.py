"""InternVL's tokenizers, conversation formats and processors.

Formats after OpenGVLab/InternVL c981100 (internvl_chat/internvl/conversation.py); the placeholder after 2410d1d
(internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py: ``chat``).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import BadDataError, unknown_name
from mgll_encoder.common.library_errors import library_reason
from mgll_encoder.common.texts import read_json
from mgll_encoder.text.pretrained import library_errors, quiet
from mllm_adapters.core.contract import Plan, VisionContract
from mllm_adapters.core.processing import (
    check_placeholder,
    check_sentencepiece,
    has_tokenizer,
    image_settings,
    llava_processor,
    load_tokenizer,
    text_side,
)
from mllm_adapters.families import read_template

IMAGE, START, END = "<IMG_CONTEXT>", "<img>", "</img>"

VIDEO = "<video>"
"""Placeholder that the stock processor expands to image tokens; it is never passed to the model."""

PROCESSORS: Mapping[str, str] = {
    "internvl": "InternVLProcessor",
    "mgll_internvl": "MgllInternVLProcessor",
    "llava": "LlavaProcessor",
}
"""``model_type`` of the target -> class of its processor."""

_INTERNVL_1 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_INTERNVL_2_5 = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


@dataclass(frozen=True)
class ConversationFormat:
    """A conversation format.

    Attributes:
        file: Jinja template.
        words: Its variables.
        stop: End token of an answer.
    """

    file: str
    words: Mapping[str, str]
    stop: str


FORMATS: Mapping[str, ConversationFormat] = {
    "Hermes-2": ConversationFormat(
        "internvl_chatml.jinja", {"system": _INTERNVL_1, "end": "<|im_end|>"}, "<|im_end|>"
    ),
    "internlm2-chat": ConversationFormat(
        "internvl_chatml.jinja", {"system": _INTERNVL_1, "end": "<|im_end|>"}, "<|im_end|>"
    ),
    "internvl2_5": ConversationFormat(
        "internvl_chatml.jinja", {"system": _INTERNVL_2_5, "end": "<|im_end|>\n"}, "<|im_end|>"
    ),
    "internvl_zh": ConversationFormat(
        "internvl_colon.jinja", {"system": "", "user": "<human>", "assistant": "<bot>"}, "</s>"
    ),
    "vicuna_v1.1": ConversationFormat(
        "internvl_colon.jinja", {"system": _VICUNA, "user": "USER", "assistant": "ASSISTANT"}, "</s>"
    ),
}
"""``template`` of an original config.json -> conversation format."""


@dataclass(frozen=True)
class TextSettings:
    """Token ids that the model's configuration needs.

    Attributes:
        image_token_id: Id of the image placeholder.
        stops: Ids that end an answer.
    """

    image_token_id: int
    stops: tuple[int, ...]


def conversation(folder: Path, template: str | None, vocabulary: int) -> TextSettings | None:
    """Read the token ids of a checkpoint in the original layout; None if it has no tokenizer.

    Args:
        folder: The checkpoint.
        template: ``template`` of its config.json.
        vocabulary: Rows of its embedding.

    Raises:
        UserError: the tokenizer cannot be read, lacks a token, or does not match the weights; or the format
            is unknown.
    """
    if not has_tokenizer(folder):
        return None
    tokenizer, stop = original_tokenizer(folder), _format(folder, template).stop
    vocab = tokenizer.get_vocab()
    for token in (IMAGE, START, END, stop):
        if vocab.get(token, vocabulary) >= vocabulary:
            found = f"gives it the id {vocab[token]}" if token in vocab else "does not have it"
            raise BadDataError(
                f"{folder}: token {token} needs one of the {vocabulary} rows of the embedding, but the tokenizer "
                f"{found}: use this checkpoint's tokenizer files"
            )
    ends = (tokenizer.eos_token_id, vocab[stop])
    return TextSettings(vocab[IMAGE], tuple(dict.fromkeys(i for i in ends if i is not None)))


def processor(plan: Plan, image_processor: Any) -> Any | None:
    """Return the processor of a planned checkpoint; None if the source has no tokenizer.

    Raises:
        UserError: the tokenizer cannot be read, or does not match the weights.
    """
    from transformers import InternVLProcessor, InternVLVideoProcessor

    from mllm_adapters.families.internvl.modeling import MgllInternVLProcessor

    if not has_tokenizer(plan.source):
        return None
    template: str | None
    if plan.layout == "original":
        tokenizer = original_tokenizer(plan.source)
        template = _template(_format(plan.source, read_json(plan.source / "config.json").get("template")))
    else:
        found = text_side(plan.source)
        assert found is not None, "it has a tokenizer"
        tokenizer, template, _ = found
    check_placeholder(tokenizer, IMAGE, plan.image_token_id)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if plan.config["model_type"] == "llava":
        around = template and template.replace(IMAGE, START + IMAGE + END)
        return llava_processor(plan.after, tokenizer, around, IMAGE)
    common = {
        "image_processor": image_processor,
        "tokenizer": tokenizer,
        "image_seq_length": plan.after.tokens,
        "chat_template": template,
    }
    if plan.config["model_type"] == "mgll_internvl":
        return MgllInternVLProcessor(**common)
    names = {
        "context_image_token": IMAGE,
        "start_image_token": START,
        "end_image_token": END,
        "video_token": VIDEO,
    }
    # As in its constructor for named tokens; there is no public way to do this later.
    tokenizer._set_model_specific_special_tokens(special_tokens=names)
    side = {"height": plan.after.image_size, "width": plan.after.image_size}
    video = InternVLVideoProcessor(
        size=side, image_mean=list(plan.after.mean), image_std=list(plan.after.std)
    )
    return InternVLProcessor(**common, video_processor=video)


def image_processor(plan: Plan) -> Any | None:
    """Return the image processor that can cut tiles; None if the target needs another one."""
    from transformers import GotOcr2ImageProcessor

    after: VisionContract = plan.after
    if plan.config["model_type"] == "llava" or after.resize != "squash":
        return None
    most = {}
    if after.tiles > 1:
        source = read_json(plan.source / "config.json")
        most = {
            "min_patches": source.get("min_dynamic_patch", 1),
            "max_patches": source.get("max_dynamic_patch", 6),
        }
    return GotOcr2ImageProcessor(
        size={"height": after.image_size, "width": after.image_size},
        image_mean=list(after.mean),
        image_std=list(after.std),
        crop_to_patches=after.tiles > 1,
        **most,
    )


def tiles(folder: Path, model_type: str) -> int:
    """Return the maximum tiles per image, including its thumbnail, of a folder in the transformers layout."""
    settings = image_settings(folder)[0] or {}
    # The stock processor cuts tiles regardless of its image processor's settings.
    cuts = model_type == "internvl" or settings.get("crop_to_patches")
    most = int(settings.get("max_patches") or 12) if cuts else 1
    return most + (most > 1)


def original_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint in the original layout.

    InternLM2's is Python code with a SentencePiece model; it is rebuilt from the model and the ids in
    tokenizer_config.json, which may rename pieces of the model.

    Raises:
        UserError: it cannot be read, or tokenizes differently from the SentencePiece model.
    """
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    kind = str(settings.get("tokenizer_class", ""))
    if not kind.startswith("InternLM2"):
        tokenizer: Any = load_tokenizer(folder)
        if kind.startswith("Llama"):  # releases before 5.0 add <s> by default
            tokenizer.add_bos_token = settings.get("add_bos_token", True)
        return tokenizer
    try:
        with quiet():
            return _internlm2(folder, settings)
    except library_errors() as error:
        raise BadDataError(f"the tokenizer in {folder} cannot be read: {library_reason(error)}") from None


def _internlm2(folder: Path, settings: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    ends = {
        name: _content(settings.get(name)) for name in ("unk_token", "bos_token", "eos_token", "pad_token")
    }
    ends = {name: token for name, token in ends.items() if token}
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **ends)
    vocab, _, merges = SentencePieceExtractor(str(folder / "tokenizer.model")).extract()
    added = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    pieces = {i: piece for piece, i in vocab.items()}
    renamed = {_content(added[i]) if i in added else piece: i for i, piece in pieces.items()}
    rebuilt = LlamaTokenizer(
        vocab=renamed,
        merges=merges,
        add_prefix_space=_adds_prefix(folder / "tokenizer.model"),
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        **ends,
    )
    for _, token in sorted(added.items()):
        special = token.get("special", True)
        rebuilt.add_tokens(
            [AddedToken(_content(token), normalized=False, special=special)], special_tokens=special
        )
    found = {i: rebuilt.convert_tokens_to_ids(_content(token)) for i, token in added.items()}
    if wrong := [i for i in added if found[i] != i]:
        raise BadDataError(
            f"{folder}/tokenizer_config.json: token {_content(added[wrong[0]])} should have the id {wrong[0]}, but "
            f"would get {found[wrong[0]]}: download the tokenizer files again"
        )
    check_sentencepiece(rebuilt, folder)
    return rebuilt


def _adds_prefix(model: Path) -> bool:
    """Whether a SentencePiece model adds a space before a text."""
    from sentencepiece import SentencePieceProcessor

    reader = SentencePieceProcessor(model_file=str(model))
    return bool(reader.encode("a", out_type=str)[0].startswith("▁"))


def _content(token: Any) -> str:
    """Return the text of a token that a JSON file gives as string or object."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _format(folder: Path, template: str | None) -> ConversationFormat:
    if template is None or template not in FORMATS:
        raise unknown_name(
            f"conversation template (field 'template' of {folder}/config.json)", str(template), FORMATS
        )
    return FORMATS[template]


def _template(form: ConversationFormat) -> str:
    words = {**form.words, "image": IMAGE}
    head = "".join(
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in words.items()
    )
    return head + read_template(form.file)
