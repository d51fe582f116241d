"""What a plan's report, the model card and the support matrix say of connectors and processors."""

import pytest

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
from mllm_adapters.core.wording import connector_words, processor_words

RETRAIN = ": retrain the projector"


@pytest.mark.parametrize(
    ("fate", "words", "advice"),
    [
        (Kept(width=1024), "kept (1024 wide)", ""),
        (Reinitialized(before=1664, after=1024), "re-initialized (1664 -> 1024 wide)", RETRAIN),
        (
            Reinitialized(before=64, after=32, because="latents"),
            "re-initialized (64 -> 32 wide), completely, because its latents have the width of the features",
            RETRAIN,
        ),
        (
            Reinitialized(before=32, after=48, because="patches"),
            "re-initialized (reads single patches, not merged ones)",
            RETRAIN,
        ),
        (
            Added(before=128, after=32),
            "added with random weights, the original needs none (128 -> 32 wide)",
            RETRAIN,
        ),
        (Unneeded(width=128), "none: features and language model are both 128 wide", ""),
        (Taken(source="blip2.pth", width=1024), "taken from blip2.pth (1024 wide)", ""),
        (Fitted(), "fitted on images", ""),
        (Fitted(images=500, r2=0.8584), "fitted on 500 images, held-out R² 0.858", ""),
    ],
)
def test_what_becomes_of_a_connector(fate: ConnectorFate, words: str, advice: str) -> None:
    assert connector_words(fate) == words + advice
    assert connector_words(fate, advice=False) == words


@pytest.mark.parametrize(
    ("fate", "words"),
    [
        (None, "not written: no tokenizer found (image processor only)"),
        (ProcessorFate(), "the source's, with the new preprocessing"),
        (
            ProcessorFate(name="LlavaProcessor", tokenizer="LlamaTokenizer"),
            "LlavaProcessor with the source's LlamaTokenizer",
        ),
        (
            ProcessorFate(name="FlamingoProcessor", origin="language_model"),
            "FlamingoProcessor with the language model's tokenizer",
        ),
        (
            ProcessorFate(name="QwenVLProcessor", made_of="qwen.tiktoken"),
            "QwenVLProcessor with a fast tokenizer from qwen.tiktoken",
        ),
        (
            ProcessorFate(name="InstructBlipProcessor", tokenizers=2, template=True),
            "InstructBlipProcessor with the source's 2 tokenizers and a chat template",
        ),
    ],
)
def test_how_a_processor_comes_about(fate: ProcessorFate | None, words: str) -> None:
    assert processor_words(fate) == words
