"""Processors: what the source says about preprocessing, and the processor that the target needs."""

from pathlib import Path
from typing import Any

from mgll_encoder.checkpoint import read_json
from mgll_encoder.common.errors import UserError
from mgll_encoder.preprocess import image_processor, read_preprocessing
from mgll_encoder.spec import CLIP_MEAN, CLIP_STD, PixelRule
from mllm_adapters.contract import VisionContract
from mllm_adapters.planning import IMAGE_TOKEN

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def host_pixels(folder: Path, image_size: int) -> tuple[PixelRule, tuple[str, ...]]:
    """How a model folder prepares images, and what had to be assumed.

    Args:
        folder: A model folder in the transformers layout.
        image_size: Input side of its tower.

    Raises:
        UserError: its image processor makes pictures of another size, or none that are square.
    """
    nested, flat = folder / "processor_config.json", folder / "preprocessor_config.json"
    settings = read_json(nested).get("image_processor") if nested.is_file() else None
    where = nested if settings else flat
    if not settings and not flat.is_file():
        assumed = PixelRule(image_size=image_size, mean=CLIP_MEAN, std=CLIP_STD, resize="crop")
        return assumed, (
            f"{folder} has no image processor: CLIP's normalisation and centre crop are assumed",
        )
    fields, notes = read_preprocessing(settings or read_json(flat), where)
    rule = PixelRule(**fields)
    if rule.image_size != image_size:
        raise UserError(
            f"{where}: images are made {rule.image_size} px wide, but config.json's tower takes {image_size} px"
        )
    return rule, notes


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer saved in a model folder, or None where it holds none.

    Raises:
        UserError: it cannot be read, or cuts text in another way than the SentencePiece model beside it.
    """
    import transformers

    if not has_tokenizer(folder):
        return None
    settings = folder / "tokenizer_config.json"
    named = read_json(settings).get("tokenizer_class", "") if settings.is_file() else ""
    sentencepiece = folder / "tokenizer.model"
    # For a SentencePiece model, AutoTokenizer goes by the model_type of config.json and cuts text in another way
    # where that is not the language model's; the class that the tokenizer itself names is right.
    own = getattr(transformers, named.removesuffix("Fast"), None) if sentencepiece.is_file() else None
    try:
        tokenizer = (own or transformers.AutoTokenizer).from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from None
    if sentencepiece.is_file():
        _check_against(sentencepiece, tokenizer)
    return tokenizer


def _check_against(sentencepiece: Path, tokenizer: Any) -> None:
    from sentencepiece import SentencePieceProcessor

    probe = "USER: Which disease does this image show?\nA. Glaucoma\nB. Myopia"
    expected = SentencePieceProcessor(model_file=str(sentencepiece)).encode(probe)
    found = tokenizer(probe, add_special_tokens=False).input_ids
    if found != expected:
        raise UserError(
            f"{sentencepiece.parent}: {type(tokenizer).__name__} reads the tokenizer in another way than its "
            f"SentencePiece model (ids {found[:5]} ..., expected {expected[:5]} ...): check tokenizer_class in "
            "tokenizer_config.json"
        )


def load_processor(folder: Path) -> Any | None:
    """The processor saved in a model folder of the transformers layout, or None where it holds no tokenizer.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoProcessor

    if not has_tokenizer(folder):
        return None
    try:
        return AutoProcessor.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"the processor in {folder} cannot be read: {error}") from None


def with_placeholder(tokenizer: Any, image_token_id: int) -> None:
    """Give a tokenizer the image placeholder, and a padding token if it has none.

    Raises:
        UserError: the placeholder would not get the planned id.
    """
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
    )
    found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if found != image_token_id:
        raise UserError(f"{tokenizer.name_or_path}: {IMAGE_TOKEN} got id {found}, expected {image_token_id}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def llava_processor(
    contract: VisionContract, tokenizer: Any, chat_template: str | None, image_token: str = IMAGE_TOKEN
) -> Any:
    """A LlavaProcessor that expands the placeholder to ``contract.tokens`` and prepares images as it says."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=image_processor(contract),
        tokenizer=tokenizer,
        patch_size=contract.patch_size,
        vision_feature_select_strategy="full" if contract.class_token else "default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy takes off again
        image_token=image_token,
        chat_template=chat_template,
    )
