"""Starting from a whole CLIP: image and text features are those of open_clip's own code."""

from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from mgll_encoder.common.errors import (
    BadDataError,
    InvalidArgumentError,
    NotFoundError,
    UnknownNameError,
    UnsupportedCheckpointError,
)
from mgll_encoder.data.batches import SplitRows
from mgll_encoder.paired.clip_text import clip_text_tower
from mgll_encoder.paired.read import text_tower_of
from mgll_encoder.pretraining.dual_encoder import TOWER_SIZES
from mgll_encoder.pretraining.initialization import starting_towers
from mgll_encoder.pretraining.losses import Alphas
from mgll_encoder.pretraining.options import PretrainOptions
from mgll_encoder.tower.load import load_tower
from tests.mgll_encoder.towers import scramble, state_of, write

TEXTS = ["a normal fundus", "severe non-proliferative diabetic retinopathy, left eye", "drusen!"]


def whole_clip(quick_gelu: bool, custom_text: bool = False, vocabulary: int = 49408) -> torch.nn.Module:
    vision = CLIPVisionCfg(layers=2, width=64, head_width=64, patch_size=14, image_size=28)
    text = CLIPTextCfg(context_length=16, vocab_size=vocabulary, width=128, heads=2, layers=2)
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = scramble(kind(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu))
    model.logit_scale.data.fill_(3.0)
    return model


def started(path: Path, activation: str = "gelu", **more):
    return starting_towers(
        TOWER_SIZES["tiny"], str(path), activation, "auto", SplitRows, Alphas(), **more
    ).eval()


@pytest.mark.parametrize(("quick_gelu", "custom_text"), [(False, False), (True, True)])
def test_both_towers_give_the_features_of_open_clip(tmp_path, quick_gelu, custom_text):
    model = whole_clip(quick_gelu, custom_text)
    file = write(state_of(model), tmp_path / "clip.pt")
    right, wrong = ("quick_gelu", "gelu") if quick_gelu else ("gelu", "quick_gelu")
    towers, control = started(file, right), started(file, wrong)
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = model.encode_image(pixels)
        texts = model.encode_text(open_clip.tokenizer.SimpleTokenizer(context_length=16)(TEXTS))
        assert (towers.image_features(pixels) - images).abs().max() < 1e-5
        assert (towers.text.features(TEXTS) - texts).abs().max() < 1e-5
        assert (control.text.features(TEXTS) - texts).abs().max() > 1e-5
        assert (control.image_features(pixels) - images).abs().max() > 1e-5
        assert (towers.text.features(TEXTS[::-1]) - texts).abs().max() > 1e-3
    assert float(towers.loss.scale.detach()) == pytest.approx(torch.tensor(3.0).exp().item())


def test_image_and_text_tower_are_of_the_same_set_of_weights(tmp_path):
    model = whole_clip(False)
    raw, file = state_of(model), tmp_path / "averaged.pt"
    torch.save({"state_dict": raw, "state_dict_ema": {k: v * 1.5 for k, v in raw.items()}}, file)
    alone = write(raw, tmp_path / "raw.pt")
    texts = {}
    for chosen, path in {"raw": file, "ema": file, None: alone}.items():
        tower = load_tower(path, activation="gelu", weights=chosen)
        texts[chosen] = text_tower_of(path, tower).features(TEXTS).detach()
    assert torch.equal(texts["raw"], texts[None])
    assert (texts["ema"] - texts["raw"]).abs().max() > 1e-3


def test_a_training_starts_from_the_set_of_weights_that_is_asked_for(tmp_path):
    raw, file = state_of(whole_clip(False)), tmp_path / "averaged.pt"
    torch.save({"state_dict": raw, "state_dict_ema": {k: v * 1.5 for k, v in raw.items()}}, file)
    first = {chosen: started(file, weights=chosen).vision.state_dict() for chosen in ("raw", "ema", None)}
    name = "embeddings.patch_embedding.weight"
    assert torch.equal(first["raw"][name], first[None][name])
    assert torch.equal(first["ema"][name], first["raw"][name] * 1.5)
    with pytest.raises(InvalidArgumentError, match="`init_weights` is for `init`"):
        PretrainOptions(init_weights="ema")
    with pytest.raises(UnknownNameError, match="weights"):
        PretrainOptions(init=file, init_weights="average")


def test_a_visual_tower_alone_has_no_text_tower(tmp_path):
    file = write(state_of(whole_clip(False).visual), tmp_path / "visual.pt")
    assert clip_text_tower(file, "gelu", 24) is None


def test_another_vocabulary_or_a_missing_key_is_one_line(tmp_path):
    other = write(state_of(whole_clip(False, vocabulary=50)), tmp_path / "other.pt")
    with pytest.raises(BadDataError, match=r"other.pt: the text tower has 50 tokens"):
        started(other)
    state = state_of(whole_clip(False))
    del state["transformer.resblocks.1.ln_2.bias"]
    with pytest.raises(
        UnsupportedCheckpointError, match=r"not that of a CLIP: .*layers\.1\.layer_norm2\.bias"
    ):
        started(write(state, tmp_path / "cut.pt"))


def test_openai_without_a_connection_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise FileNotFoundError("Failed to download file (open_clip_model.safetensors)\nmore")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", offline)
    with pytest.raises(
        NotFoundError, match=r"`init=openai`: .* cannot be downloaded .*connect to the internet"
    ):
        starting_towers(TOWER_SIZES["tiny"], "openai", None, "auto", SplitRows, Alphas())
