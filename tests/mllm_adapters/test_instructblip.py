"""Somebody gives InstructBLIP the eyes of MGLL."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoProcessor,
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from eval_mcq.schema import MCQItem
from eval_mcq.score import LetterScorer
from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import UserError
from mllm_adapters import load_mllm
from mllm_adapters.apply import apply_plan
from mllm_adapters.cli.swap import main as swap_encoder
from mllm_adapters.contract import Plan
from mllm_adapters.conversations import Conversation, Corpus
from mllm_adapters.examples import IGNORED, AnswerCollator, encode, prepare_examples
from mllm_adapters.registry import detect, open_checkpoint
from mllm_adapters.stages import apply_stage
from tests import builders
from tests.mllm_adapters.families.case import Golden
from tests.mllm_adapters.families.full_size import check_full_size, published_tower
from tests.mllm_adapters.families.instructblip import CASES, inputs
from tests.mllm_adapters.test_swap import a_tower

PROMPTS = Path(__file__).parent / "prompts"
QUESTION = "Which disease does this image show?"


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Letters and digits as words: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz0123456789?.'"]
    vocab = {word: i for i, word in enumerate([*words, *(f"##{w}" for w in words[4:])])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def text_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Every byte is a token; special tokens as in the published folders: Vicuna's begins with </s>, T5's ends so."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["[PAD]", "<unk>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    single = "</s> $A" if kind == "llama" else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", 2)])
    bos = {"bos_token": "</s>"} if kind == "llama" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="<unk>", eos_token="</s>", padding_side="left", **bos
    )  # fmt: skip


def tiny_instructblip(folder: Path, kind: str = "llama", placeholder: int | None = None) -> Path:
    """A stock checkpoint with the files of a published one; without ``placeholder`` as published in 2023."""
    torch.manual_seed(1)
    tokenizer = text_tokenizer(kind)
    rows = len(tokenizer) + (0 if kind == "llama" else 13)  # T5 has spare rows
    text: Any = (
        LlamaConfig(
            vocab_size=rows, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=2, eos_token_id=2, pad_token_id=0, max_position_embeddings=512,
        )
        if kind == "llama"
        else T5Config(
            vocab_size=rows, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip
    config = InstructBlipConfig(
        vision_config={
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 28, "patch_size": 7, "initializer_range": 0.2,
        },
        qformer_config={
            "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3,
            "vocab_size": 90, "max_position_embeddings": 24, "cross_attention_frequency": 2,
        },
        text_config=text, num_query_tokens=5, image_token_index=placeholder, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = InstructBlipForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    if placeholder is None:
        written.pop("image_token_index", None)
    (folder / "config.json").write_text(json.dumps(written))
    tokenizer.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder / "qformer_tokenizer")
    BlipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def swap(source: Path, tower: Path, out: Path | None = None, parts: dict[str, Path] | None = None) -> Plan:
    checkpoint, family, _ = open_checkpoint(source, parts)
    plan = family.plan(checkpoint, inspect_tower(tower))
    if out is not None:
        apply_plan(plan, family, checkpoint, out)
    return plan


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_instructblip(tmp_path_factory.mktemp("models") / "instructblip")


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tower(tmp_path_factory.mktemp("towers") / "mgll", width=32, image_size=28)


@pytest.fixture(scope="module")
def swapped(stock: Path, eyes: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("swap") / "swapped"
    plan = swap(stock, eyes, out)
    model, processor = load_mllm(out, dtype=torch.float32)
    return SimpleNamespace(plan=plan, out=out, model=model, processor=processor)


# --- The original's numbers, where the contract test does not look ---------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_the_qformer_gives_what_the_original_gave(case: Any, golden: Path) -> None:
    vectors = Golden(golden / case.golden)
    parts = {name: vectors.folder / path for name, path in (case.parts or {}).items()}
    model, _ = load_mllm(vectors.folder, dtype=torch.float32, parts=parts)
    for sequence in ("seq0", "seq1"):
        given = inputs(model, vectors, sequence)
        seen = model.get_image_features(given["pixel_values"], given["qformer_input_ids"])
        expected = vectors.expected[f"{sequence}.visual_tokens"]
        torch.testing.assert_close(seen.pooler_output, expected, atol=1e-4, rtol=0)
        expected = vectors.expected[f"{sequence}.qformer_output"]
        torch.testing.assert_close(seen.qformer_outputs.last_hidden_state, expected, atol=1e-4, rtol=0)
        other = model.get_image_features(given["pixel_values"], given["qformer_input_ids"].flip(1))
        assert (other.pooler_output - seen.pooler_output).abs().max() > 1e-3, (
            "the Q-Former reads the instruction"
        )


def test_it_generates_what_the_original_generated(golden: Path) -> None:
    vectors = Golden(golden / "instructblip")
    model, _ = load_mllm(vectors.folder, dtype=torch.float32)
    expected = vectors.expected["seq0.greedy"][0].tolist()
    given = inputs(model, vectors, "seq0")
    new = model.generate(**given, do_sample=False, max_new_tokens=8, eos_token_id=None)
    # The vocabulary has grown by rows that the original could not say; its first id is the start token.
    assert new[0, given["input_ids"].shape[1] :].tolist() == expected[-8:]


# --- Layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "t5"])
@torch.no_grad()
def test_the_layout_of_2023_gets_a_placeholder_and_says_the_same(kind: str, tmp_path: Path) -> None:
    source = tiny_instructblip(tmp_path / kind, kind)
    checkpoint, family, layout = open_checkpoint(source)
    plan = family.plan(checkpoint)
    size = len(text_tokenizer(kind))
    assert layout == "stock"
    assert plan.image_token_id == size
    assert plan.config["text_config"]["vocab_size"] % 64 == (0 if kind == "llama" else (size + 13) % 64)
    model, processor = load_mllm(source, dtype=torch.float32)
    reference = InstructBlipForConditionalGeneration.from_pretrained(source)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids, read = torch.tensor([[2, 50, 60, 70]]), torch.tensor([[2, 9, 10, 3]])
    given = {"pixel_values": pixels, "qformer_input_ids": read}
    if kind == "t5":
        given["decoder_input_ids"] = torch.tensor([[0, 40, 41]])
    visual = reference.get_image_features(pixels, read).pooler_output
    embedded = torch.cat([visual, reference.get_input_embeddings()(ids)], dim=1)
    decoder = {"decoder_input_ids": given["decoder_input_ids"]} if kind == "t5" else {}
    expected = reference.language_model(inputs_embeds=embedded, **decoder).logits
    images = ids.new_full((1, 5), plan.image_token_id)
    found = model(input_ids=torch.cat([images, ids], dim=1), **given).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert processor is not None


def test_a_placeholder_that_is_there_is_kept(tmp_path: Path) -> None:
    source = tiny_instructblip(tmp_path / "new", placeholder=77)
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint)
    assert plan.image_token_id == 77
    assert {step.operation for step in plan.steps} == {"keep"}


def test_tables_of_older_files_are_left_out(stock: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stock, tmp_path / "older"))
    state = load_file(folder / "model.safetensors")
    state["qformer.embeddings.position_ids"] = torch.arange(24)[None]
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_mllm(folder, dtype=torch.float32)
    assert model.config.image_token_id == len(text_tokenizer("llama"))


# --- The swap --------------------------------------------------------------------------------------------------------


def test_readers_of_another_width_are_made_anew_and_their_biases_kept(
    stock: Path, swapped: SimpleNamespace
) -> None:
    before, after = load_file(stock / "model.safetensors"), swapped.model.state_dict()
    assert swapped.plan.before.width == 24
    assert swapped.plan.after.width == 32
    readers = [name for name in swapped.plan.readers if name.startswith("qformer.")]
    assert len(readers) == 4, "key and value in layers 0 and 2"
    for reader in readers:
        assert after[f"{reader}.weight"].shape == (36, 32)
        assert torch.equal(after[f"{reader}.bias"], before[f"{reader}.bias"])
    assert torch.equal(after["vision_model.ln_vision.weight"], torch.ones(32))
    assert torch.equal(after["vision_model.ln_vision.bias"], torch.zeros(32))
    for name in ("query_tokens", "language_projection.weight", "qformer.embeddings.word_embeddings.weight"):
        assert torch.equal(after[name], before[name])
    assert swapped.plan.before.tokens == swapped.plan.after.tokens == 5


def test_readers_of_the_same_width_stay_with_their_norm(stock: Path, tmp_path: Path) -> None:
    plan = swap(stock, a_tower(tmp_path / "tower", width=24), tmp_path / "out")
    assert set(plan.readers.values()) == {"kept (24 wide)"}
    before = load_file(stock / "model.safetensors")
    model, _ = load_mllm(tmp_path / "out", dtype=torch.float32)
    found = model.get_submodule("vision_model.ln_vision")
    assert torch.equal(found.weight, before["vision_model.post_layernorm.weight"])
    assert found.eps == 1e-6


@torch.no_grad()
def test_the_qformer_sees_all_tokens_one_block_before_the_end(swapped: SimpleNamespace) -> None:
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert swapped.plan.after.image_size == 56, "the host's 4x4 patches"
    vision = swapped.model.vision_model
    hidden = vision.tower(pixels, output_hidden_states=True).hidden_states
    found = vision(pixels).last_hidden_state
    assert found.shape == (2, 17, 32)
    torch.testing.assert_close(found, vision.ln_vision(hidden[-2]))
    assert (found - vision.ln_vision(hidden[-1])).abs().max() > 1e-3


def trained_qformer(path: Path, width: int, layers: tuple[int, ...] = (0, 2)) -> dict[str, torch.Tensor]:
    """A stage-1 Q-Former as LAVIS saves it."""
    torch.manual_seed(8)
    state = {f"ln_vision.{kind}": torch.randn(width) for kind in ("weight", "bias")}
    for layer in layers:
        for module in ("key", "value"):
            name = f"Qformer.bert.encoder.layer.{layer}.crossattention.self.{module}"
            state |= {f"{name}.weight": torch.randn(36, width), f"{name}.bias": torch.randn(36)}
    state |= {"itm_head.weight": torch.randn(2, 36), "temp": torch.randn(1)}
    torch.save({"model": state}, path)
    return state


def test_readers_can_come_from_a_qformer_trained_on_clip(stock: Path, eyes: Path, tmp_path: Path) -> None:
    state = trained_qformer(tmp_path / "blip2_pretrained_vitL.pth", 32)
    plan = swap(stock, eyes, tmp_path / "out", {"qformer": tmp_path / "blip2_pretrained_vitL.pth"})
    assert set(plan.readers.values()) == {"taken from blip2_pretrained_vitL.pth (32 wide)"}
    assert len(plan.readers) == 5
    model, _ = load_mllm(tmp_path / "out", dtype=torch.float32)
    found = model.get_submodule("qformer.encoder.layer.2.crossattention.attention.value")
    name = "Qformer.bert.encoder.layer.2.crossattention.self.value"
    assert torch.equal(found.weight, state[f"{name}.weight"])
    assert torch.equal(found.bias, state[f"{name}.bias"])
    norm = model.get_submodule("vision_model.ln_vision")
    assert torch.equal(norm.weight, state["ln_vision.weight"])
    assert norm.eps == 1e-5, "that of LAVIS"


@pytest.mark.parametrize(
    ("width", "layers", "complaint"),
    [
        (40, (0, 2), "has shape .40., expected .32.: take a Q-Former trained on a tower of width 32"),
        (32, (0,), "has no Qformer.bert.encoder.layer.2.crossattention.self.key.weight"),
    ],
)
def test_a_qformer_that_does_not_fit_is_refused(
    width: int, layers: tuple[int, ...], complaint: str, stock: Path, eyes: Path, tmp_path: Path
) -> None:
    trained_qformer(tmp_path / "other.pth", width, layers)
    with pytest.raises(UserError, match=complaint):
        swap(stock, eyes, parts={"qformer": tmp_path / "other.pth"})


@torch.no_grad()
def test_with_t5_it_answers_about_the_image(eyes: Path, tmp_path: Path) -> None:
    swap(tiny_instructblip(tmp_path / "t5", "t5"), eyes, tmp_path / "out")
    model, processor = load_mllm(tmp_path / "out", dtype=torch.float32)
    batch = processor(images=Image.new("RGB", (40, 30), (200, 80, 40)), text=QUESTION, return_tensors="pt")
    assert batch["input_ids"][0, -1] == 2, "T5's texts end with </s>"
    assert model.generate(**batch, do_sample=False, min_new_tokens=3, max_new_tokens=3).shape == (1, 4)
    answer = {"decoder_input_ids": torch.tensor([[0, 40]])}
    seen = model(**batch, **answer).logits
    blank = model(**{**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}, **answer).logits
    assert (seen - blank).abs().max() > 1e-3
    stage = apply_stage(model)
    assert not [name for name in stage.names if "language_model" in name or ".tower." in name]


# --- Processor -------------------------------------------------------------------------------------------------------


def test_the_prompt_is_image_and_question(swapped: SimpleNamespace) -> None:
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    conversation: list[dict[str, Any]] = [{"role": "user", "content": content}]
    prompt = swapped.processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt == (PROMPTS / "instructblip.txt").read_text().removesuffix("\n")
    conversation += [{"role": "assistant", "content": [{"type": "text", "text": "B"}]}]
    assert swapped.processor.apply_chat_template(conversation) == f"{prompt} B</s>"


def test_visual_tokens_come_before_the_token_that_begins_a_text(swapped: SimpleNamespace) -> None:
    processor = AutoProcessor.from_pretrained(swapped.out)
    assert type(processor) is type(swapped.processor)
    image = Image.new("RGB", (50, 40), (200, 80, 40))
    one = processor(images=[image], text=[f"<image>{QUESTION}"], return_tensors="pt")
    placeholder = swapped.plan.image_token_id
    letters = text_tokenizer("llama")(QUESTION).input_ids
    assert letters[0] == 2
    assert one["input_ids"].tolist() == [[placeholder] * 5 + letters]
    assert one["pixel_values"].shape == (1, 3, 56, 56)
    read = processor.qformer_tokenizer.decode(one["qformer_input_ids"][0])
    assert read.startswith("[CLS]")
    assert one["qformer_input_ids"].shape == (1, 24), "cut to what the Q-Former has positions for"
    assert "image" not in processor.qformer_tokenizer.decode(
        processor(images=[image], text=["<image>a b"], return_tensors="pt")["qformer_input_ids"][0]
    )
    stock_style = processor(images=image, text=QUESTION, return_tensors="pt")
    assert torch.equal(stock_style["input_ids"], one["input_ids"])
    bare = processor(images=[image], text=["<image>"], add_special_tokens=False)
    assert bare["input_ids"] == [[placeholder] * 5]
    with pytest.raises(ValueError, match="put <image> before the text"):
        processor(images=[image], text=["see <image>"])


def test_a_batch_of_two_texts_gives_what_each_gives_alone(swapped: SimpleNamespace) -> None:
    images = [Image.new("RGB", (50, 40), colour) for colour in ((200, 80, 40), (0, 90, 250))]
    texts = ["<image>a b c?", "<image>what is it?"]
    batch = swapped.processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert batch["qformer_attention_mask"].sum(dim=1).tolist() != [batch["qformer_input_ids"].shape[1]] * 2
    with torch.no_grad():
        together = swapped.model(**batch).logits[:, -1]  # padded on the left
        for row, (image, text) in enumerate(zip(images, texts, strict=True)):
            alone = swapped.model(
                **swapped.processor(images=[image], text=[text], return_tensors="pt")
            ).logits
            torch.testing.assert_close(together[row], alone[0, -1], atol=1e-4, rtol=0)


def conversation(question: str, answer: str, image: str | None = "a.png") -> Conversation:
    tag = "<image>\n" if image else ""
    turns = [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
    return Conversation.model_validate({"id": question, "image": image, "conversations": turns})


@pytest.mark.parametrize("which", ["stock", "swapped"])
def test_it_learns_from_conversations_and_the_qformer_never_reads_an_answer(
    which: str, stock: Path, swapped: SimpleNamespace, tmp_path: Path
) -> None:
    model, processor = (
        load_mllm(stock, dtype=torch.float32) if which == "stock" else (swapped.model, swapped.processor)
    )
    builders.picture(tmp_path, "a.png")
    rows = [conversation("a b?", "zzz"), conversation("c d e f?", "yes it is")]
    examples, counts = prepare_examples(
        Corpus(tmp_path / "x.json", tmp_path, rows, {"a.png": (40, 40)}), processor, 64, False
    )
    assert counts.kept == 2
    encoded = [encode(example, tmp_path, processor) for example in examples]
    learnt = encoded[0]["labels"][encoded[0]["labels"] != IGNORED]
    assert processor.tokenizer.decode(learnt) == " zzz</s>"
    assert encoded[0]["input_ids"][:6].tolist() == [processor.image_token_id] * 5 + [2]
    assert (
        processor.qformer_tokenizer.decode(encoded[0]["qformer_input_ids"][0], skip_special_tokens=True)
        == "a b?"
    )
    batch = AnswerCollator(processor.tokenizer.pad_token_id)(encoded)
    assert batch["qformer_input_ids"].shape[0] == 2
    stage = apply_stage(model)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert any(name.endswith("crossattention.attention.key.weight") for name in stage.names)
    plain = {name: value for name, value in batch.items() if name not in ("logits_to_keep", "shift_labels")}
    torch.testing.assert_close(model(**plain).loss, loss)
    model.zero_grad(set_to_none=True)


def test_text_alone_will_do(swapped: SimpleNamespace, tmp_path: Path) -> None:
    text = swapped.processor(text=["Which disease is it?"], return_tensors="pt")
    assert "qformer_input_ids" not in text
    with torch.no_grad():
        found = swapped.model(**text).logits
        expected = swapped.model.language_model(**text).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("which", ["stock", "swapped"])
def test_eval_mcq_can_put_questions_to_it(which: str, stock: Path, swapped: SimpleNamespace) -> None:
    model, processor = (
        load_mllm(stock, dtype=torch.float32) if which == "stock" else (swapped.model, swapped.processor)
    )
    scorer = LetterScorer(model, processor)
    items = [
        MCQItem(
            id=str(i),
            images=["a.png"],
            question=QUESTION[: 20 + i],
            options=["Glaucoma", "Myopia"],
            answer=0,
            category="x",
        )
        for i in range(2)
    ]
    scorer.check_letters(items)
    images = [[Image.new("RGB", (50, 40), colour)] for colour in ((200, 80, 40), (0, 90, 250))]
    together = scorer.score(items, images)
    for item, image, score in zip(items, images, together, strict=True):
        alone = scorer.score([item], [image])[0]
        assert score.probabilities == pytest.approx(alone.probabilities, abs=1e-4)
