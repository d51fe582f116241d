"""Sharing computation between questions changes no answer, in any family; if it would, it is not used."""

import pytest
import torch
from PIL import Image

from eval_mcq.items.schema import MCQItem
from eval_mcq.scoring.engine import Engine
from eval_mcq.scoring.packing import branches, common, fitting, part_of
from eval_mcq.scoring.prefix_tree import Tree, common_length
from eval_mcq.scoring.prompt import Ask, order
from eval_mcq.scoring.score import Scorer
from mllm_adapters import load_mllm
from tests.mllm_adapters import complete

WAYS = {
    "instructblip": set(),  # its Q-Former reads the question with the image
    "aya-vision": set(),  # its tiny language model attends to 64 tokens only, and the prompts are longer
    "paligemma": set(),  # its image and its prompt attend to each other
    "med-flamingo": {"tree"},  # cross-attention: no cache that is continued by hand
}
"""Family -> what it can share; the others share everything."""

QUICK = ("llava-hf", "qwen2_5-vl", "med-flamingo", "instructblip")
ROWS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in complete.BUILDERS
    if name != "instructblip-t5"
]


def pictures(count: int) -> list[Image.Image]:
    torch.manual_seed(0)
    return [
        Image.fromarray(torch.randint(0, 255, (50 + 9 * i, 60, 3), dtype=torch.uint8).numpy())
        for i in range(count)
    ]


def questions(count: int) -> list[MCQItem]:
    """Of ragged length, with two to four options."""
    options = ["drusen", "a cataract", "nothing at all", "diabetic retinopathy"]
    return [
        MCQItem(id=f"q{i}", images=["x"], question="What is seen" + " here" * i + "?", options=options[: 2 + i % 3],
                answer=0, category="x")
        for i in range(count)
    ]  # fmt: skip


def asks(items: list[MCQItem], rotations: int) -> list[Ask]:
    return [Ask(item, rotation) for item in items for rotation in range(min(rotations, len(item.options)))]


@torch.no_grad()
def by_definition(scorer: Scorer, ask: Ask, image: Image.Image) -> list[float]:
    """A full forward pass of a single question: logits of the letters at the end, in the original order."""
    prompt, tokenizer = scorer.prompt(ask.item, ask.rotation), scorer.processor.tokenizer
    starts = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    batch = scorer.processor(text=prompt, images=[image], return_tensors="pt", add_special_tokens=not starts)
    probabilities = scorer.model(**batch).logits[0, -1].float().softmax(dim=-1)
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    shown = []
    for letter in "ABCD"[: len(ask.item.options)]:
        written = {
            tuple(tokenizer(prompt + v + letter, add_special_tokens=False).input_ids) for v in ("", " ")
        }
        ids = {ids[-1] for ids in written if list(ids[:-1]) == before}
        shown.append(sum(float(probabilities[i]) for i in ids))
    places = order(len(shown), ask.rotation)
    return [shown[places.index(option)] / sum(shown) for option in range(len(shown))]


@pytest.mark.parametrize("name", ROWS)
def test_many_questions_on_many_images_score_as_each_by_itself(name, request, tmp_path):
    folder = complete.BUILDERS[name](tmp_path / "m", lambda: request.getfixturevalue("golden"))
    scorer = Scorer(*load_mllm(folder, dtype=torch.float32))
    images = pictures(3)
    groups = [asks(questions(3), 3), asks(questions(2), 2), asks(questions(1), 2)]
    prepared = [scorer.prepare(group, [image]) for group, image in zip(groups, images, strict=True)]
    together = scorer.answer(prepared)
    for group, image, scores in zip(groups, images, together, strict=True):
        for ask, score in zip(group, scores, strict=True):
            assert score.probabilities == pytest.approx(by_definition(scorer, ask, image), abs=1e-4)
            assert score.probabilities != pytest.approx(score.probabilities[::-1], abs=1e-6), "says something"
    trusted = {way for way in ("prefix", "tree") if scorer.engine.trusted.get(way)}
    assert trusted == WAYS.get(name, {"prefix", "tree"})


@pytest.mark.parametrize("mode", ["options", "options-mean"])
def test_likelihoods_of_option_texts_are_those_of_each_text_by_itself(tiny_llava, mode):
    model, processor = load_mllm(tiny_llava, dtype=torch.float32)
    scorer, (image,) = Scorer(model, processor, mode=mode), pictures(1)
    group = asks(questions(3), 2)
    for ask, score in zip(group, scorer.answer([scorer.prepare(group, [image])])[0], strict=True):
        sums, counts = [], []
        for text in ask.item.options:
            prompt = scorer.prompt(ask.item, ask.rotation)
            batch = processor(text=prompt + " " + text, images=[image], return_tensors="pt")
            tokens = len(processor.tokenizer(" " + text).input_ids)
            with torch.no_grad():
                logits = model(**batch).logits[0, :-1].log_softmax(dim=-1)
            each = logits.gather(1, batch["input_ids"][0, 1:, None])[-tokens:]
            sums.append(float(each.sum()))
            counts.append(tokens)
        assert score.tokens == counts
        assert score.log_likelihoods == pytest.approx(sums, abs=1e-3)
        per = [s / n if mode == "options-mean" else s for s, n in zip(sums, counts, strict=True)]
        assert score.choice == per.index(max(per))


@pytest.mark.parametrize("way", ["plain", "tree"])
def test_half_precision_does_not_round_the_letters_to_a_tie(tiny_llava, way):
    model, processor = load_mllm(tiny_llava, dtype=torch.bfloat16)
    scorer, (image,) = Scorer(model, processor, dtype=torch.bfloat16, way=way), pictures(1)
    a, b = (processor.tokenizer(letter, add_special_tokens=False).input_ids[-1] for letter in "AB")
    head = model.lm_head.weight.data
    seen = []
    model.lm_head.register_forward_hook(lambda _, given, __: seen.append(given[0][0, -1].float()))
    group = asks(questions(1), 1)
    scorer.answer([scorer.prepare(group, [image])])
    head[a] *= 40
    for place in range(head.shape[1]):
        head[b] = head[a]
        head[b, place] *= 1 + 2**-6
        logits = head[[a, b]].float() @ seen[-1]
        if logits[0] != logits[1] and logits[0].bfloat16() == logits[1].bfloat16():
            break  # half precision makes a tie of these
    else:
        raise AssertionError("no nudge is lost in half precision")
    exact = logits.softmax(dim=0)
    score = scorer.answer([scorer.prepare(group, [image])])[0][0]
    assert score.probabilities == pytest.approx(exact.tolist(), abs=1e-4)
    assert score.probabilities[0] != score.probabilities[1]


def test_an_image_passes_the_tower_once_whatever_is_asked_about_it(tiny_llava):
    scorer = Scorer(*load_mllm(tiny_llava, dtype=torch.float32))
    images = pictures(2)
    prepared = [scorer.prepare(asks(questions(3), 3), [image]) for image in images]
    scorer.answer(prepared)  # the first time the ways are held against the plain one
    seen = []
    tower = scorer.model.model.vision_tower
    tower.register_forward_hook(lambda module, given, output: seen.append(len(output[0])))
    scorer.answer(prepared)
    assert seen == [2]


def test_a_model_that_another_mask_would_mislead_is_asked_plainly(tiny_llava, caplog, monkeypatch):
    """Negative control of the initial check: a strategy with wrong positions is detected."""
    right = Engine._positions
    monkeypatch.setattr(Engine, "_positions", lambda *given: right(*given) * 2)
    scorer, (image,) = Scorer(*load_mllm(tiny_llava, dtype=torch.float32)), pictures(1)
    for weight in scorer.model.model.language_model.layers.parameters():
        weight.data *= 4  # untrained attention hardly looks at positions
    group = asks(questions(2), 2)
    scores = scorer.answer([scorer.prepare(group, [image])])[0]
    assert scorer.engine.trusted == {"plain": True, "prefix": False, "tree": False}
    assert "changes this model's answers" in "\n".join(caplog.messages)
    for ask, score in zip(group, scores, strict=True):
        assert score.probabilities == pytest.approx(by_definition(scorer, ask, image), abs=1e-4)


def test_out_of_memory_halves_the_batch_and_loses_nothing(tiny_llava, monkeypatch, caplog):
    scorer, images = Scorer(*load_mllm(tiny_llava, dtype=torch.float32)), pictures(3)
    prepared = [scorer.prepare(asks(questions(2), 2), [image]) for image in images]
    expected = scorer.answer(prepared)
    run, sizes = Engine.run, []

    def small(self, batch):
        sizes.append(sum(len(p.rows) for p in batch))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("no")
        return run(self, batch)

    monkeypatch.setattr(Engine, "run", small)
    for found, right in zip(scorer.answer(prepared), expected, strict=True):
        for a, b in zip(found, right, strict=True):
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-4)
    assert "Out of memory" in "\n".join(caplog.messages)
    tried = len(sizes)
    scorer.answer(prepared)
    assert max(sizes[tried:]) <= 3, "what did not fit is not tried again"


def test_generated_replies_are_the_same_in_a_batch_and_alone(tiny_llava):
    scorer, (image,) = Scorer(*load_mllm(tiny_llava, dtype=torch.float32), mode="generate"), pictures(1)
    group = asks(questions(3), 2)
    together = scorer.answer([scorer.prepare(group, [image])])[0]
    alone = [scorer.answer([scorer.prepare([ask], [image])])[0][0] for ask in group]
    assert [score.reply for score in together] == [score.reply for score in alone]
    assert all(score.choice is None for score in together), "an untrained model's reply is no answer"


@pytest.mark.parametrize("mode", ["letters", "options"])
def test_trees_hold_every_row_once_compute_less_than_row_by_row_and_are_of_like_size(tiny_llava, mode):
    scorer, (image,) = Scorer(*load_mllm(tiny_llava, dtype=torch.float32), mode=mode), pictures(1)
    prepared = scorer.prepare(asks(questions(12), 4), [image])
    start = common(prepared)
    cut = branches(prepared, start, attention_budget=1000.0)
    assert sorted(number for rows in cut for number in rows) == list(range(len(prepared.rows)))
    parts = [part_of(0, prepared, start, rows) for rows in cut]
    alone = sum(len(part_of(0, prepared, start, [number]).tree) for number in range(len(prepared.rows)))
    assert sum(len(part.tree) for part in parts) < 0.95 * alone
    padded = sum(len(some) * max(len(part.tree) for part in some) for some in fitting(parts, start))
    assert padded <= 1.25 * sum(len(part.tree) for part in parts)
    assert len(branches(prepared, start, attention_budget=1.0)) > len(cut), (
        "where attention is dear, trees are small"
    )


def test_short_trees_are_not_padded_to_long_ones(tiny_llava):
    scorer, (image,) = Scorer(*load_mllm(tiny_llava, dtype=torch.float32)), pictures(1)
    prepared = scorer.prepare(asks(questions(12), 4), [image])
    rows = len(prepared.rows)
    parts = [part_of(0, prepared, 0, [number]) for number in range(rows)]
    parts += [part_of(0, prepared, 0, range(rows))] * 2
    passes = list(fitting(parts, 0))
    assert sum(map(len, passes)) == rows + 2
    assert len(passes) <= 4, "lengths within a quarter share a pass"
    assert all(len(one.tree) > 0.75 * max(len(part.tree) for part in some) for some in passes for one in some)


@pytest.mark.parametrize("per_image", [1, 3])
def test_a_large_batch_is_computed_in_passes_that_fit_the_caches_of_a_cpu(tiny_llava, monkeypatch, per_image):
    scorer = Scorer(*load_mllm(tiny_llava, dtype=torch.float32))
    batch = [scorer.prepare(asks(questions(per_image), 2), [image]) for image in pictures(12)]
    whole = scorer.answer(batch)
    sizes, forward = [], scorer.model.forward

    def counted(*args, **kwargs):
        sizes.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(scorer.model, "forward", counted)
    scorer.engine._tokens = 600
    in_passes = scorer.answer(batch)
    assert len(sizes) > 4
    assert max(sizes) <= 600
    for one, other in zip(whole, in_passes, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-6)


def test_a_tree_holds_each_beginning_once():
    tree = Tree()
    ends = [tree.add(path) for path in ([1, 2, 3], [1, 2, 4, 5], [1, 2, 3])]
    assert tree.tokens == [1, 2, 3, 4, 5]
    assert tree.depths == [0, 1, 2, 2, 3]
    assert ends == [2, 4, 2]
    assert tree.visible().int().tolist()[4] == [1, 1, 0, 1, 1]
    assert common_length([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
