"""Words the fates of connectors and processors, for plan reports, model cards and the support matrix."""

from mllm_adapters.core.fates import (
    Added,
    ConnectorFate,
    Fitted,
    Kept,
    ProcessorFate,
    Reinitialized,
    Taken,
    Unneeded,
)


def connector_words(fate: ConnectorFate, *, advice: bool = True) -> str:
    """Describe the fate of a connector and, with ``advice``, what the user should do about it."""
    match fate:
        case Kept():
            return f"kept ({fate.width} wide)"
        case Reinitialized():
            return f"re-initialized {_reinitialized(fate)}{': retrain the projector' if advice else ''}"
        case Added():
            found = f"added with random weights, the original needs none ({fate.before} -> {fate.after} wide)"
            return f"{found}: retrain the projector" if advice else found
        case Unneeded():
            return f"none: features and language model are both {fate.width} wide"
        case Taken():
            return f"taken from {fate.source} ({fate.width} wide)"
        case Fitted(images=None):
            return "fitted on images"
        case Fitted():
            return f"fitted on {fate.images} images, held-out R² {fate.r2:.3f}"


def _reinitialized(fate: Reinitialized) -> str:
    if fate.because == "patches":
        return "(reads single patches, not merged ones)"
    latents = ", completely, because its latents have the width of the features"
    return f"({fate.before} -> {fate.after} wide){latents if fate.because == 'latents' else ''}"


def processor_words(fate: ProcessorFate | None) -> str:
    """Describe how a processor is made."""
    if fate is None:
        return "not written: no tokenizer found (image processor only)"
    if fate.name is None:
        return "the source's, with the new preprocessing"
    whose = {"source": "the source's", "language_model": "the language model's"}[fate.origin]
    tokenizer = f"a fast tokenizer from {fate.made_of}" if fate.made_of else f"{whose} {_tokenizers(fate)}"
    return f"{fate.name} with {tokenizer}{' and a chat template' if fate.template else ''}"


def _tokenizers(fate: ProcessorFate) -> str:
    return f"{fate.tokenizers} tokenizers" if fate.tokenizers > 1 else fate.tokenizer or "tokenizer"
