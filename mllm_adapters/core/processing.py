"""Processors: reads the source's preprocessing, and makes the target's processor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import BadDataError, MismatchError
from mgll_encoder.common.texts import read_json
from mgll_encoder.text.pretrained import is_sentencepiece, load_pretrained, quiet
from mgll_encoder.tower.architectures import described_by
from mgll_encoder.tower.preprocess import image_processor, read_preprocessing
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD, PixelRule
from mllm_adapters.checkpoints.checkpoint import TOKENIZER_FILES
from mllm_adapters.core.architectures import MODEL_TYPES, register_models
from mllm_adapters.core.configs import build_config
from mllm_adapters.core.contract import VisionContract
from mllm_adapters.core.fates import ProcessorFate
from mllm_adapters.core.planning import IMAGE_TOKEN

_PROBE = "USER: Which disease does this image show?\nA. Glaucoma\nB. Myopia"


def host_pixels(
    folder: Path, image_size: int, assumed: PixelRule | None = None
) -> tuple[PixelRule, tuple[str, ...]]:
    """Return a model folder's pixel rule, and notes on assumptions.

    Args:
        folder: A model folder in the transformers layout.
        image_size: Input side of its tower.
        assumed: Rule for a folder without image processor; None for CLIP's.

    Raises:
        UserError: its image processor makes images of another size, or that are not square.
    """
    settings, where = image_settings(folder)
    if settings is None:
        if assumed is not None:
            return assumed, (f"{folder} has no image processor: that of its published models is assumed",)
        clip = PixelRule(image_size=image_size, mean=CLIP_MEAN, std=CLIP_STD, resize="crop")
        return clip, (f"{folder} has no image processor: CLIP's normalization and center crop are assumed",)
    fields, notes = read_preprocessing(settings, where)
    rule = PixelRule(**fields)
    if rule.image_size != image_size:
        raise MismatchError(
            f"{where}: images are resized to {rule.image_size} px, but config.json's tower takes "
            f"{image_size} px"
        )
    return rule, notes


def image_settings(folder: Path) -> tuple[dict[str, Any] | None, Path]:
    """Return the image processor settings of a model folder (None if there are none), and their file.

    Raises:
        UserError: that file cannot be read.
    """
    nested, flat = folder / "processor_config.json", folder / "preprocessor_config.json"
    if nested.is_file() and (settings := read_json(nested).get("image_processor")):
        return settings, nested
    return (read_json(flat) if flat.is_file() else None), flat


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def processor_fate(folder: Path, **fields: Any) -> ProcessorFate | None:
    """Describe the processor of a plan (fields of a `ProcessorFate`); None if the folder has no tokenizer."""
    return ProcessorFate(**fields) if has_tokenizer(folder) else None


def load_tokenizer(folder: Path) -> Any | None:
    """Load the tokenizer of a model folder; None if it has none.

    Raises:
        UserError: it cannot be read, or tokenizes differently from the SentencePiece model in the folder.
    """
    import transformers

    if not has_tokenizer(folder):
        return None
    _register(folder, _config(folder))
    if (folder / "tokenizer.json").is_file():
        read_json(folder / "tokenizer.json")
    settings = folder / "tokenizer_config.json"
    named = read_json(settings).get("tokenizer_class") or "" if settings.is_file() else ""
    if not isinstance(named, str):
        raise BadDataError(f"{settings}: tokenizer_class is {named!r:.60}: expected the name of a class")
    named = named.replace(
        "LLaMA", "Llama"
    )  # the spelling of the first LLaMA conversions, which cannot be loaded
    sentencepiece = folder / "tokenizer.model"
    expected = _sentencepiece_ids(sentencepiece) if sentencepiece.is_file() else None
    # For a SentencePiece model, AutoTokenizer uses the model_type of config.json and tokenizes differently
    # if that is not the language model's; the class named by the tokenizer itself is correct.
    own = getattr(transformers, named.removesuffix("Fast"), None) if expected else None
    tokenizer = load_pretrained(own or transformers.AutoTokenizer, folder, f"the tokenizer in {folder}")
    if expected:
        _check_against(expected, tokenizer, folder)
    return tokenizer


def _config(folder: Path) -> dict[str, Any]:
    """Read config.json; empty if there is none."""
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def _register(folder: Path, config: Mapping[str, Any]) -> None:
    """Register our classes for the model_type in config.json, or for the named processor.

    A native model can have our processor, as a converted InstructBLIP does.
    """
    register_models([str(config.get("model_type"))])
    if (folder / "processor_config.json").is_file():
        named = read_json(folder / "processor_config.json").get("processor_class")
        register_models(name for name, row in MODEL_TYPES.items() if row.processor and row.processor == named)


def check_sentencepiece(tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer that tokenizes differently from the SentencePiece model in its folder.

    Raises:
        UserError: it differs, or the model cannot be read.
    """
    _check_against(_sentencepiece_ids(folder / "tokenizer.model"), tokenizer, folder)


def _sentencepiece_ids(model: Path) -> list[int]:
    from sentencepiece import SentencePieceProcessor

    if not is_sentencepiece(model):
        raise BadDataError(f"{model} is not a SentencePiece model: copy or download it again")
    with quiet():
        ids: list[int] = SentencePieceProcessor(model_file=str(model)).encode(_PROBE)
    return ids


def _check_against(expected: list[int], tokenizer: Any, folder: Path) -> None:
    found = tokenizer(_PROBE, add_special_tokens=False).input_ids
    if found != expected:
        raise BadDataError(
            f"{folder}: {type(tokenizer).__name__} tokenizes differently from its SentencePiece model (ids "
            f"{found[:5]} ..., expected {expected[:5]} ...): check tokenizer_class in "
            "tokenizer_config.json"
        )


def load_processor(
    folder: Path, config: Mapping[str, Any] | None = None, *, checked: bool = False
) -> Any | None:
    """Load the processor of a model folder in the transformers layout; None if it has no tokenizer.

    Args:
        folder: The folder.
        config: The contents of its config.json, if they have already been read.
        checked: The folder has already passed `mgll_encoder.text.pretrained.check_configs`.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoProcessor, LlavaProcessor

    if not has_tokenizer(folder):
        return None
    config = config or _config(folder)
    _register(folder, config)
    processor = load_pretrained(AutoProcessor, folder, f"the processor in {folder}", checked=checked)
    if not hasattr(processor, "tokenizer"):  # the result of transformers if the files name no processor
        raise BadDataError(
            f"{folder}: its files make up a {type(processor).__name__}, expected a processor of images and text: check "
            "processor_class in processor_config.json and preprocessor_config.json"
        )
    if isinstance(processor, LlavaProcessor):
        where = folder / "config.json"
        _complete_llava(processor, config or read_json(where), where)
    return processor


def _complete_llava(processor: Any, settings: Mapping[str, Any], where: Path) -> None:
    """Complete a LlavaProcessor from an older folder: otherwise images become no tokens, or one too few.

    See issues 34447 and 36002 of huggingface/transformers.
    """
    config = build_config(settings, str(where))
    if processor.patch_size is None:
        processor.patch_size = config.vision_config.patch_size
    if processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    if architecture := described_by(config.vision_config.model_type):
        processor.num_additional_image_tokens = architecture.leading


def text_side(folder: Path) -> tuple[Any, str | None, str] | None:
    """Return tokenizer, chat template and image placeholder of a model folder in the transformers layout.

    An image processor is not required. None if there is no tokenizer.

    Raises:
        UserError: they cannot be read.
    """
    if any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        processor = load_processor(folder)
        if processor is None:
            return None
        tokenizer = getattr(processor, "tokenizer", processor)
        return tokenizer, processor.chat_template, getattr(processor, "image_token", IMAGE_TOKEN)
    tokenizer, older = load_tokenizer(folder), folder / "chat_template.json"
    if tokenizer is None:
        return None
    template = read_json(older).get("chat_template") if older.is_file() else tokenizer.chat_template
    return tokenizer, template, IMAGE_TOKEN


def with_placeholder(tokenizer: Any, image_token_id: int, image_token: str = IMAGE_TOKEN) -> None:
    """Add the image placeholder to a tokenizer, and a padding token if it has none.

    Raises:
        UserError: the placeholder would not get the planned id.
    """
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False
    )
    check_placeholder(tokenizer, image_token, image_token_id)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def check_placeholder(tokenizer: Any, image_token: str, image_token_id: int) -> None:
    """Refuse a tokenizer and a config.json with different ids of the image placeholder.

    Raises:
        UserError: they differ.
    """
    found = tokenizer.convert_tokens_to_ids(image_token)
    if found != image_token_id:
        raise MismatchError(
            f"{tokenizer.name_or_path}: the tokenizer gives {image_token} the id {found}, expected {image_token_id}: "
            "tokenizer and config.json do not belong together"
        )


def llava_processor(
    contract: VisionContract, tokenizer: Any, chat_template: str | None, image_token: str = IMAGE_TOKEN
) -> Any:
    """Make a LlavaProcessor that expands the placeholder to ``contract.tokens`` and uses its pixel rule."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=image_processor(contract),
        tokenizer=tokenizer,
        patch_size=contract.patch_size,
        vision_feature_select_strategy=contract.select_strategy,
        num_additional_image_tokens=contract.leading,  # a class token, which the strategy removes
        image_token=image_token,
        chat_template=chat_template,
    )
