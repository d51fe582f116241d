"""How examples fall into batches and processes changes nothing, whatever the family."""

import pytest
import torch

from mllm_adapters.core.stages import is_adapter
from mllm_adapters.data.dataset import AnswerCollator, ConversationDataset
from mllm_adapters.feature_cache.cache import cache_features
from mllm_adapters.feature_cache.precompute import ComputeSettings
from mllm_adapters.training.dummy_images import FillingCollator, filler_row
from mllm_adapters.training.engine import train
from mllm_adapters.training.prepare import prepare_training
from mllm_adapters.training.recipe import Recipe, RunOptions
from tests.mllm_adapters import complete
from tests.mllm_adapters.retraining import turns, uneven_rows, write_json

QUICK = ("instructblip", "qwen2_5-vl")
"""Rows of the default run: a Q-Former, and a merger whose class says that it knows no loss but its own."""

ROWS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in complete.BUILDERS
    if name != "instructblip-t5"
]
"""All but the one that training refuses: its language model has an encoder."""

NEVER_BLIND = ("instructblip",)
"""Rows whose stock class takes no batch without an image."""

OPTIONS = RunOptions(logging_steps=1, report_to=())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows about images with answers of one to five words, and two rows without an image at the end."""
    folder = tmp_path_factory.mktemp("data")
    rows = uneven_rows(folder / "images")
    rows += [{"id": word, "conversations": turns("Hello", word)} for word in ("Hi", "Good morning")]
    return write_json(folder / "train.json", rows)


@pytest.fixture
def plan(data, request, tmp_path):
    sources = {}

    def make(name, **recipe):
        if name not in sources:
            sources[name] = complete.steady(name, tmp_path, lambda: request.getfixturevalue("golden"))
        return prepare_training(sources[name], data, data.parent / "images", Recipe(**recipe))

    return make


@pytest.mark.parametrize("name", ROWS)
def test_answer_tokens_weigh_the_same_however_a_step_is_split(name, plan, tmp_path):
    settings = {"max_steps": 3, "learning_rate": 1e-2}
    losses = []
    for size, times in ((4, 1), (1, 4)):
        job = plan(name, batch_size=size, gradient_accumulation=times, **settings)
        outcome = train(job, tmp_path / f"{size}", OPTIONS)
        losses.append([loss for _, loss in outcome.losses])
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)

    job = plan(name)
    dataset = ConversationDataset(job.examples, job.corpus.folder, job.processor)
    collate = AnswerCollator(job.processor.tokenizer.pad_token_id or 0)
    rows = [dataset[i] for i in range(4)]
    with torch.no_grad():
        whole = job.model(**collate(rows)).loss
        means = torch.stack([job.model(**collate([row])).loss for row in rows]).mean()
    assert abs(float(whole - means)) > 2e-4, "negative control: a mean of means would be seen"


@pytest.mark.parametrize("cached", [False, True], ids=["images", "cached"])
@pytest.mark.parametrize("name", ROWS)
def test_a_batch_without_images_reaches_every_weight_that_trains_and_moves_none_by_it(name, cached, plan):
    job = plan(name, stage="lora", lora_dropout=0.0)
    dataset = ConversationDataset(job.examples, job.corpus.folder, job.processor)
    collate = AnswerCollator(job.processor.tokenizer.pad_token_id or 0)
    if cached:
        found = cache_features(
            job.model, job.examples, job.corpus, job.processor, ComputeSettings(torch.device("cpu"))
        )
        dataset, collate = found.dataset, found.collator
    filled = FillingCollator(collate, filler_row(dataset, job.examples))
    pictured, texts = [dataset[i] for i in (0, 1)], [dataset[i] for i in (8, 9)]
    assert len(filled(pictured)["labels"]) == 2
    assert len(filled(texts)["labels"]) == 3
    safe = gradients(job.model, filled(texts))
    assert safe.keys() == gradients(job.model, collate(pictured)).keys()
    if name in NEVER_BLIND:
        with pytest.raises(TypeError, match="pixel_values"):
            gradients(job.model, collate(texts))
        alone = {name: value for name, value in safe.items() if is_adapter(name)}
    else:
        alone = gradients(job.model, collate(texts))
    assert alone.keys() < safe.keys(), "negative control: without the row, some weights have no gradient"
    for weight, value in safe.items():
        expected = alone.get(weight, torch.zeros(()))
        torch.testing.assert_close(value, expected.expand_as(value), atol=1e-6, rtol=1e-4)


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
