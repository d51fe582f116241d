import pytest
import torch
from tokenizers import normalizers, processors

from eval_mcq.items.schema import load_bench
from eval_mcq.scoring.score import Scorer
from mgll_encoder.common.errors import BadDataError, NotFoundError
from mgll_encoder.common.images import open_image
from tests.builders import CHAT_TEMPLATE
from tests.eval_mcq.helpers import scorer, small_bench


@pytest.fixture
def questions(tmp_path):
    bench = load_bench(small_bench(tmp_path))
    return bench.items, [[open_image(path) for path in bench.image_paths(item)] for item in bench.items]


def one_by_one(model_scorer: Scorer, items, images) -> list[list[float]]:
    """The definition without batching, padding or shortcuts: logits of the letters at the end of the prompt."""
    found = []
    for item, of_item in zip(items, images, strict=True):
        batch = model_scorer.processor(text=model_scorer.prompt(item), images=of_item, return_tensors="pt")
        with torch.no_grad():
            logits = model_scorer.model(**batch).logits[0, -1]
        ids = [
            model_scorer.processor.tokenizer.convert_tokens_to_ids(letter)
            for letter in "ABC"[: len(item.options)]
        ]
        found.append(logits[ids].softmax(dim=0).tolist())
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_ragged_questions_scores_as_one_by_one(tiny_llava, questions, side):
    items, images = questions
    model_scorer = scorer(tiny_llava)
    model_scorer.processor.tokenizer.padding_side = side
    expected = one_by_one(model_scorer, items, images)
    for size in (1, 3, len(items)):
        scores = []
        for start in range(0, len(items), size):
            scores += model_scorer.score(items[start : start + size], images[start : start + size])
        assert [len(score.probabilities) for score in scores] == [len(item.options) for item in items]
        for score, reference in zip(scores, expected, strict=True):
            assert score.probabilities == pytest.approx(reference, abs=1e-4)
            assert score.choice == reference.index(max(reference))
            assert 0 < score.letter_mass < 1


def test_reading_the_padding_instead_of_the_answer_would_show(tiny_llava, questions):
    """Negative control: the last position of a right-padded batch is not where the answer is."""
    items, images = questions
    model_scorer = scorer(tiny_llava)
    model_scorer.processor.tokenizer.padding_side = "right"
    texts = [model_scorer.prompt(item) for item in items]
    batch = model_scorer.processor(
        text=texts, images=[i for of in images for i in of], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        wrong = model_scorer.model(**batch).logits[:, -1]
    ids = [model_scorer.processor.tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]
    expected = one_by_one(model_scorer, items, images)
    shortest = min(range(len(items)), key=lambda i: len(texts[i]))
    assert len(items[shortest].options) == 2
    assert wrong[shortest, ids].softmax(dim=0).tolist() != pytest.approx(expected[shortest], abs=1e-3)


def test_another_image_gives_another_score(tiny_llava, questions):
    items, images = questions
    model_scorer = scorer(tiny_llava)
    first, second = (model_scorer.score(items[:1], [images[i]])[0].probabilities for i in (0, 9))
    assert first != second


def test_a_letter_written_with_a_space_counts_too(tiny_llava, questions):
    items, images = questions
    model_scorer = scorer(tiny_llava)
    before = model_scorer.score(items[1:2], images[1:2])[0]
    model_scorer = scorer(tiny_llava)
    model_scorer.processor.tokenizer.add_tokens([" A", " B", " C"])
    model = model_scorer.model
    model.resize_token_embeddings(len(model_scorer.processor.tokenizer), mean_resizing=False)
    with torch.no_grad():  # " A" exactly as likely as "A", " B" and " C" impossible
        head = model.get_output_embeddings().weight
        head[-3:] = 0
        head[-3] = head[model_scorer.processor.tokenizer.convert_tokens_to_ids("A")]
    prompt = model_scorer.prompt(items[1])
    ids = model_scorer.writer.letter_ids(prompt, 3)
    assert [len(of_letter) for of_letter in ids] == [2, 2, 2]
    with torch.no_grad():
        logits = model(**model_scorer.processor(text=[prompt], images=images[1], return_tensors="pt")).logits[
            0, -1
        ]
    by_hand = torch.stack([logits[of_letter].exp().sum() for of_letter in ids])
    after = model_scorer.score(items[1:2], images[1:2])[0]
    assert after.probabilities == pytest.approx((by_hand / by_hand.sum()).tolist(), abs=1e-5)
    assert after.letter_mass > before.letter_mass


def test_a_letter_that_is_two_tokens_is_refused(tiny_llava, questions):
    items, images = questions
    model_scorer = scorer(tiny_llava)
    model_scorer.processor.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("C", "cc")
    model_scorer.score(items[:1], images[:1])  # two options: A and B are enough
    with pytest.raises(BadDataError, match="option letter 'C' is not a single token"):
        model_scorer.score(items[:2], images[:2])


def test_a_template_that_writes_the_first_token_does_not_get_it_twice(tiny_llava, questions):
    items, images = questions
    scores = []
    for template in (CHAT_TEMPLATE, "<s>" + CHAT_TEMPLATE):
        model_scorer = scorer(tiny_llava)
        model_scorer.processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        model_scorer.processor.chat_template = template
        scores.append(model_scorer.score(items, images))
    assert [s.probabilities for s in scores[0]] == [s.probabilities for s in scores[1]]


def test_a_model_without_processor_or_template_is_refused(tiny_llava):
    ready = scorer(tiny_llava)
    with pytest.raises(NotFoundError, match="no processor"):
        Scorer(ready.model, None)
    ready.processor.chat_template = None
    with pytest.raises(NotFoundError, match="no chat template"):
        Scorer(ready.model, ready.processor)
