"""A SigLIP's own text tower: zero-shot on the folder as it came gives the numbers of transformers."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from mgll_encoder import (
    IncompatibleTowerError,
    UnsupportedCheckpointError,
    convert_tower,
    load_tower,
)
from mgll_encoder.paired.read import text_tower_of
from mgll_encoder.probing.zero_shot import class_directions, projected
from tests.mgll_encoder.towers import scramble

WORDS = ["<pad>", "</s>", "<unk>", "normal", "fundus", "severe", "glaucoma", "drusen"]
TEXTS = ["normal fundus", "severe glaucoma", "drusen"]
PIXELS = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole SigLIP with a tokenizer of eight words."""
    place = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(WORDS),
        "max_position_embeddings": 12,
        "pad_token_id": 0,
        "projection_size": 32,
        **sizes,
    }
    vision = {"image_size": 28, "patch_size": 14, **sizes}
    model = scramble(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
    model.logit_scale.data.fill_(2.5)
    model.save_pretrained(place)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=12
    ).save_pretrained(place)
    return place


def stock(folder: Path, padding: str | bool) -> torch.Tensor:
    """Logits per image by transformers."""
    tokens = PreTrainedTokenizerFast.from_pretrained(folder)(
        TEXTS, padding=padding, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        model = SiglipModel.from_pretrained(folder).eval()
        return (
            model(pixel_values=PIXELS, input_ids=tokens["input_ids"]).logits_per_image - model.logit_bias
        ) / (model.logit_scale.exp())


def test_similarities_are_those_of_transformers(folder: Path) -> None:
    tower = load_tower(folder)
    text = text_tower_of(folder, tower)
    with torch.no_grad():
        images = projected(tower, tower.pooled(PIXELS).numpy())
    ours = torch.from_numpy(images @ class_directions(text, [[one] for one in TEXTS]).T)
    torch.testing.assert_close(ours, stock(folder, "max_length"), atol=1e-5, rtol=0)
    assert (ours - stock(folder, True)).abs().max() > 1e-3, "padding to the context is part of the model"
    assert text.temperature == pytest.approx(torch.tensor(-2.5).exp().item())


def test_no_clip_is_made_of_it_and_its_image_tower_alone_has_no_texts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        IncompatibleTowerError, match="image tower is a SigLIP: expected a CLIP ViT; `to=vision`"
    ):
        convert_tower(folder, tmp_path / "clip", to="clip")
    alone = convert_tower(folder, tmp_path / "alone").out
    with pytest.raises(UnsupportedCheckpointError, match="has no text tower"):
        text_tower_of(alone, load_tower(alone))
