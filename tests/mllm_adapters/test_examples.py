import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast

from mgll_encoder.common.errors import BadDataError
from mllm_adapters.data.chat_template import check_processor
from mllm_adapters.data.corpus import Corpus
from mllm_adapters.data.dataset import IGNORED, Collator, encode, prepare_examples
from mllm_adapters.data.llava_format import Conversation
from tests import builders
from tests.builders import rendered
from tests.mllm_adapters.retraining import turns

CHATML = (
    "<s>{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Images where they stand, the end of turn followed by a line break, the first special token written out."""

TALK = (
    "<image>\nIs the disc pale?",
    "No: it is pink.\n\nThe rim  is intact.",
    "And the macula, über all?",
    "Flat ✓",
)


@pytest.fixture
def processor(tiny_llava):
    return AutoProcessor.from_pretrained(tiny_llava)


@pytest.fixture
def images(tmp_path):
    builders.picture(tmp_path / "images", "a.png")
    builders.picture(tmp_path / "images", "b.png", (0, 0, 250), size=90)
    return tmp_path / "images"


def conversation(*texts, image="a.png"):
    return Conversation.model_validate({"id": "x", "image": image, "conversations": turns(*texts)})


def corpus(folder, *rows):
    sizes = {"a.png": (40, 40), "b.png": (90, 90)}
    return Corpus(folder / "train.json", folder, rows, sizes)


def labeled(encoded, processor):
    return processor.tokenizer.decode(encoded["labels"][encoded["labels"] != IGNORED])


def test_labels_are_the_answers_with_their_end_of_turn_and_nothing_else(processor, images):
    encoded = encode(rendered(conversation(*TALK), processor), images, processor)
    assert labeled(encoded, processor) == f" {TALK[1]}</s> {TALK[3]}</s>"


def test_labels_stand_where_their_tokens_stand(processor, images):
    encoded = encode(rendered(conversation(*TALK), processor), images, processor)
    on = encoded["labels"] != IGNORED
    assert torch.equal(encoded["labels"][on], encoded["input_ids"][on])
    masked = processor.tokenizer.decode(encoded["input_ids"][~on])
    human = [TALK[0].replace("<image>", "<image>" * 4), TALK[2]]
    assert masked == f"USER: {human[0]} ASSISTANT:USER: {human[1]} ASSISTANT:"


def test_image_positions_are_masked_and_as_many_as_the_processor_makes(processor, images):
    encoded = encode(rendered(conversation(*TALK), processor), images, processor)
    at_image = encoded["input_ids"] == processor.image_token_id
    assert at_image.sum() == 4
    assert (encoded["labels"][at_image] == IGNORED).all()
    assert encoded["pixel_values"].shape == (1, 3, 28, 28)


def test_a_template_with_special_tokens_and_line_breaks_after_turns_is_labelled_exactly(processor, images):
    processor.chat_template = CHATML
    talk = ("Left <image> or right <image>?", "Left.", "Sure?", "Yes.")
    encoded = encode(rendered(conversation(*talk, image=["a.png", "b.png"]), processor), images, processor)
    assert labeled(encoded, processor) == "Left.</s>Yes.</s>"
    assert (encoded["input_ids"] == processor.image_token_id).sum() == 8
    assert (encoded["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1
    assert encoded["pixel_values"].shape == (2, 3, 28, 28)


def test_tokens_that_carry_their_leading_space_are_labelled_exactly(processor, images):
    # Like LLaMA's tokenizer: whole words, each with the space before it.
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>", "<image>"], vocab_size=300)
    trained.train_from_iterator([f"USER: {t} ASSISTANT: {t} ," for t in TALK] * 9, trainer)
    words = PreTrainedTokenizerFast(
        tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    wordy = LlavaProcessor(
        processor.image_processor, words, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=builders.CHAT_TEMPLATE,
    )  # fmt: skip
    encoded = encode(rendered(conversation("<image>\nIs it pale?", "No: it is pink."), wordy), images, wordy)
    assert labeled(encoded, wordy).replace(" </s>", "</s>").strip() == "No: it is pink.</s>"
    assert (encoded["labels"] != IGNORED).sum() < len("No: it is pink.")


@pytest.mark.parametrize("template", [builders.CHAT_TEMPLATE, CHATML])
def test_the_first_special_token_stands_there_once_whoever_writes_it(processor, images, template):
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    processor.chat_template = template
    row = conversation("<image>\nA?", "b")
    encoded = encode(rendered(row, processor), images, processor)
    assert (encoded["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1
    assert encoded["input_ids"][0] == processor.tokenizer.bos_token_id
    _, counts = prepare_examples(corpus(images, row), processor, len(encoded["input_ids"]), text_only=False)
    assert counts.kept == 1


def test_a_template_that_rewrites_history_is_refused(processor):
    forgetful = (
        "{% for m in messages[-2:] %}{{ m['role'] }}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    )
    forgetful += "<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    processor.chat_template = forgetful
    with pytest.raises(BadDataError, match="chat template cannot be used for training"):
        rendered(conversation(*TALK), processor)


def test_a_template_that_forgets_the_image_is_refused(processor):
    processor.chat_template = builders.CHAT_TEMPLATE.replace("<image>", "")
    with pytest.raises(BadDataError, match="has 1 images, but its rendered text has 0 <image>"):
        rendered(conversation(*TALK), processor)


def test_a_processor_that_cannot_make_examples_is_refused(processor):
    with pytest.raises(BadDataError, match="no tokenizer"):
        check_processor(None)
    processor.chat_template = None
    with pytest.raises(BadDataError, match="no chat template"):
        check_processor(processor)


def test_rows_that_are_too_long_are_counted_never_cut(processor, images):
    short, long = conversation("<image>\nA?", "b"), conversation("<image>\nA?", "b" * 50)
    length = len(encode(rendered(short, processor), images, processor)["input_ids"])
    kept, counts = prepare_examples(corpus(images, short, long), processor, length, text_only=True)
    assert list(kept) == [rendered(short, processor)]
    assert (counts.rows, counts.kept, counts.too_long) == (2, 1, 1)
    with pytest.raises(BadDataError, match=r"none of 2 rows.*2 are longer than"):
        prepare_examples(corpus(images, short, long), processor, length - 1, text_only=True)


def test_rows_without_an_image_are_kept_or_counted_as_asked(processor, images):
    rows = (conversation("<image>", "b"), conversation("Hello", "b", image=None))
    assert prepare_examples(corpus(images, *rows), processor, 99, text_only=True)[1].kept == 2
    kept, counts = prepare_examples(corpus(images, *rows), processor, 99, text_only=False)
    assert (len(kept), counts.text_only) == (1, 1)


def test_a_damaged_image_is_named_when_its_row_is_read(processor, images):
    whole = (images / "b.png").read_bytes()
    (images / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadDataError, match=r"b\.png cannot be decoded"):
        encode(rendered(conversation("<image>", "x", image="b.png"), processor), images, processor)


def test_batches_are_padded_on_the_right_and_mix_rows_with_and_without_images(processor, images):
    rows = [
        conversation("<image>\nA?", "b"),
        conversation("Hi", "a longer answer than the others have", image=None),
        conversation("<image><image>\nWhich?", "c", image=["a.png", "b.png"]),
    ]
    encoded = [encode(rendered(row, processor), images, processor) for row in rows]
    batch = Collator(pad_token_id=0)(encoded)
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    for i, row in enumerate(encoded):
        n = len(row["input_ids"])
        for name, fill in {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}.items():
            assert torch.equal(batch[name][i, :n], row[name])
            assert (batch[name][i, n:] == fill).all()


def test_the_loss_is_the_cross_entropy_of_the_answer_tokens_by_hand(tiny_llava, processor, images):
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava).eval()
    rows = [conversation(*TALK), conversation("<image>\nA?", "b", image="b.png")]
    encoded = [encode(rendered(row, processor), images, processor) for row in rows]
    total, n = 0.0, 0
    with torch.no_grad():
        for row in encoded:
            logits = model(row["input_ids"][None], pixel_values=row["pixel_values"]).logits[0].double()
            for position in range(1, len(row["labels"])):
                if row["labels"][position] != IGNORED:
                    total -= F.log_softmax(logits[position - 1], 0)[row["input_ids"][position]].item()
                    n += 1
        batch = Collator(pad_token_id=0)(encoded)
        loss = model(**batch).loss.item()
        unmasked = model(**{**batch, "labels": batch["input_ids"]}).loss.item()
    assert loss == pytest.approx(total / n, abs=1e-5)
    assert abs(unmasked - loss) > 1e-3
