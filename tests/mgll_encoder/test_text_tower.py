import json
import shutil
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from mgll_encoder.common.errors import BadDataError, UserError
from mgll_encoder.pretraining.dual_encoder import TOWER_SIZES
from mgll_encoder.text.clip_tokenizer import clip_tokenizer, trimmed_tokenizer
from mgll_encoder.text.text_tower import TextTower, load_text_tower
from mgll_encoder.tower.load import load_tower
from mgll_encoder.tower.model import Tower, build_model
from mgll_encoder.tower.save import save_tower
from tests.mgll_encoder.towers import clip_model, scramble

TEXTS = [
    "a normal fundus",
    "severe glaucoma; cup-to-disc ratio 0.9",
    "drusen",
    "Œdème maculaire, the patient's left eye",
]
WORDS = ["[PAD]", "[UNK]", "normal", "fundus", "severe", "glaucoma", "drusen", "of", "the", "eye"]


def bert_folder(folder: Path) -> Path:
    """A tiny BERT with random weights and a tokenizer of a dozen words."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, hidden_act="gelu",
    )  # fmt: skip
    scramble(BertModel(config)).save_pretrained(folder)
    return folder


def tower_folder(out: Path, text: TextTower | None) -> Path:
    spec = TOWER_SIZES["tiny"].spec.model_copy(update={"depth": 1, "image_size": 16})
    return save_tower(Tower.from_model(build_model(spec), spec, torch.ones(8, spec.width)), out, text=text)


@pytest.fixture
def tower() -> TextTower:
    torch.manual_seed(0)
    return scramble(TextTower.new(TEXTS[:3], width=32, depth=2, shared=8))


def test_clips_pieces_are_those_of_open_clip():
    theirs = SimpleTokenizer()
    assert clip_tokenizer().get_vocab() == {
        piece.replace("<start_of_text>", "<|startoftext|>").replace("<end_of_text>", "<|endoftext|>"): i
        for piece, i in theirs.encoder.items()
    }
    for text in TEXTS:
        assert clip_tokenizer()(text)["input_ids"] == [49406, *theirs.encode(text), 49407]


def test_a_trimmed_tokenizer_cuts_its_texts_as_the_whole_one_does():
    trimmed, rows = trimmed_tokenizer(TEXTS)
    whole = clip_tokenizer()
    for text in TEXTS:
        assert trimmed.tokenize(text) == whole.tokenize(text)
        assert max(trimmed(text)["input_ids"]) == trimmed.eos_token_id == rows - 1
    assert len(trimmed) < 1000


def test_a_text_tower_comes_back_from_the_folder_of_its_tower(tower, tmp_path):
    tower.temperature = 0.031
    folder = tower_folder(tmp_path / "tower", tower)
    back = load_text_tower(folder)
    assert torch.equal(back.features(TEXTS[:3]), tower.features(TEXTS[:3]))
    assert back.temperature == 0.031
    assert load_tower(folder).projection.shape == (8, 128)
    _, report = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert {oct(file.stat().st_mode & 0o777) for file in folder.rglob("*") if file.is_file()} == {"0o644"}


def test_features_depend_on_the_text_but_not_on_its_neighbours(tower):
    together = tower.features(TEXTS[:3])
    alone = torch.cat([tower.features([text]) for text in TEXTS[:3]])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    assert tower.features([]).shape == (0, 8)


def test_pieces_without_a_vector_are_left_out_and_named(tower):
    assert tower.unknown(TEXTS[0]) == []
    assert "".join(tower.unknown("drusen 7")) == "7</w>"
    assert torch.equal(tower.features(["drusen 7"]), tower.features(["drusen"]))


def test_bert_is_pooled_over_its_words_and_not_over_padding(tmp_path):
    folder = bert_folder(tmp_path / "bert")
    torch.manual_seed(0)
    tower = TextTower.pretrained(str(folder), shared=8).eval()
    texts = ["normal fundus", "severe glaucoma of the eye"]
    reference = BertModel.from_pretrained(folder).eval()
    own = PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        states = [reference(**own(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
        expected = torch.stack([tower.projection(state.mean(0)) for state in states])
        with_padding = tower.projection(
            reference(**own(texts, padding=True, return_tensors="pt")).last_hidden_state.mean(1)
        )
        found = tower.features(texts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (with_padding[0] - expected[0]).abs().max() > 1e-3  # what averaging padding would give
    assert tower.context == 16
    assert len(tower.tokenize(["eye " * 50])["input_ids"][0]) == 16
    assert all(p.grad is not None for p in _trained(tower, texts).parameters())
    tower.save(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(TextTower.load(tmp_path / "saved").features(texts), tower.eval().features(texts))


def _trained(tower: TextTower, texts: list[str]) -> TextTower:
    tower.train().features(texts).sum().backward()
    return tower


@pytest.mark.parametrize("whole", [True, False])
def test_clip_text_towers_are_read_at_the_end_token_with_their_own_projection(tmp_path, whole):
    tokenizer, rows = trimmed_tokenizer(TEXTS)
    model: CLIPModel = clip_model()
    text = model.config.text_config
    text.vocab_size, text.eos_token_id, text.max_position_embeddings = rows, rows - 1, 40
    model = scramble(CLIPModel(model.config)) if whole else scramble(CLIPTextModelWithProjection(text))
    model.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    tower = TextTower.pretrained(str(tmp_path / "clip"), model.config.projection_dim).eval()
    with torch.no_grad():
        tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
        out = model.get_text_features(**tokens).pooler_output if whole else model(**tokens).text_embeds
        torch.testing.assert_close(tower.features(TEXTS), out, atol=1e-5, rtol=0)
    assert TextTower.pretrained(str(tmp_path / "clip"), 5).features(TEXTS[:1]).shape == (1, 5)


def test_a_frozen_text_tower_learns_in_its_projection_only(tmp_path):
    tower = TextTower.pretrained(str(bert_folder(tmp_path / "bert")), shared=8)
    tower.freeze()
    _trained(tower, ["normal fundus"])
    assert {name for name, p in tower.named_parameters() if p.grad is not None} == {"projection.weight"}
    assert not tower.model.training


def damage(folder: Path, name: str, change) -> None:
    file = folder / "text" / name
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: shutil.rmtree(f / "text"), "has no text tower .*converted image tower"),
        (lambda f: (f / "text" / "text_tower.json").unlink(), "expected text_tower.json"),
        (lambda f: damage(f, "text_tower.json", lambda c: c | {"pooling": "max"}), "text_tower.json"),
        (lambda f: (f / "text" / "text_projection.safetensors").unlink(), "text_projection.safetensors"),
        (lambda f: (f / "text" / "model.safetensors").write_bytes(b"x"), "cannot be read"),
        (lambda f: (f / "text" / "model.safetensors").unlink(), "cannot be read"),
        (lambda f: damage(f, "config.json", lambda c: c | {"num_hidden_layers": 3}), "lacks weights"),
        (lambda f: damage(f, "config.json", lambda c: c | {"hidden_size": 64}), "lacks weights|cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_text_tower_is_one_line(tower, tmp_path, spoil, complaint):
    folder = tower_folder(tmp_path / "tower", tower)
    spoil(folder)
    with pytest.raises(UserError, match=complaint) as caught:
        load_text_tower(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_no_text_encoder_is_refused(tmp_path):
    with pytest.raises(BadDataError, match="nowhere cannot be read"):
        TextTower.pretrained(str(tmp_path / "nowhere"), 8)
    tower_folder(tmp_path / "vision", None)
    with pytest.raises(BadDataError, match=r"text tower .*vision"):
        TextTower.pretrained(str(tmp_path / "vision"), 8)
