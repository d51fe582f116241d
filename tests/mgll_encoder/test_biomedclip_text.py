"""BiomedCLIP's own text tower, a BERT in an open_clip model: zero-shot and retrieval give the numbers of open_clip."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from transformers import BertConfig, BertModel, BertTokenizer

from mgll_encoder import BadDataError, NotFoundError, UnsupportedCheckpointError, convert_tower, load_tower
from mgll_encoder.common.errors import IncompatibleTowerError
from mgll_encoder.paired.read import text_tower_of
from mgll_encoder.probing.zero_shot import class_directions, projected
from mgll_encoder.text.text_tower import TextTower
from tests.mgll_encoder.towers import scramble

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "normal",
    "fundus",
    "severe",
    "glaucoma",
    "drusen",
    "of",
    "eye",
]
TEXTS = ["normal fundus", "severe glaucoma of eye", "drusen"]
SHARED, CONTEXT = 48, 16
TOLERANCE = 1e-5


def written(folder: Path, **changes: str) -> "open_clip.CLIP":
    """A tiny model of BiomedCLIP's architecture, as open_clip builds it, with the files of its repository."""
    bert, folder = folder / "bert", folder / "clip"
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, **sizes)).save_pretrained(bert)
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    text = {
        "hf_model_name": str(bert), "hf_tokenizer_name": str(folder), "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": CONTEXT, **changes,
    }  # fmt: skip
    vision = {
        "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224,
        "timm_model_pretrained": False,
    }  # fmt: skip
    model = scramble(open_clip.CustomTextCLIP(SHARED, vision, {**text, "hf_model_pretrained": False}))
    for name, weight in model.text.transformer.named_parameters():  # attention that matters, for the controls
        weight.data += "LayerNorm.weight" in name
        weight.data *= 5 if "attention.self" in name else 1
    model.logit_scale.data.fill_(2.5)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    pixels = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "resize_mode": "shortest"}
    cfg = {"embed_dim": SHARED, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": pixels}))
    return model


@pytest.fixture(scope="module")
def biomedclip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "open_clip.CLIP"]:
    place = tmp_path_factory.mktemp("biomedclip")
    return place / "clip", written(place)


def text_features(model: "open_clip.CLIP", folder: Path) -> np.ndarray:
    """Normalized features of the texts, by open_clip's tokenizer and model."""
    tokens = HFTokenizer(str(folder), context_length=CONTEXT)(TEXTS)
    with torch.inference_mode():
        return model.encode_text(tokens, normalize=True).numpy()


def ours(text: TextTower) -> np.ndarray:
    return class_directions(text, [[one] for one in TEXTS])


def test_similarities_are_those_of_open_clip(biomedclip: tuple[Path, "open_clip.CLIP"]) -> None:
    folder, model = biomedclip
    tower = load_tower(folder)
    text = text_tower_of(folder, tower)
    pixels = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = model.encode_image(pixels, normalize=True).numpy() @ text_features(model, folder).T
        images = projected(tower, tower.pooled(pixels).numpy())
    np.testing.assert_allclose(images @ ours(text).T, theirs, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(ours(text), text_features(model, folder), atol=TOLERANCE, rtol=0)
    assert text.context == CONTEXT
    assert text.temperature == pytest.approx(np.exp(-2.5))


@pytest.mark.parametrize("spoil", ["mean", "no mask", "linear part", "four heads", "tanh"])
def test_another_pooling_mask_projection_or_activation_would_show(
    biomedclip: tuple[Path, "open_clip.CLIP"], spoil: str
) -> None:
    folder, model = biomedclip
    text = text_tower_of(folder, load_tower(folder))
    if spoil == "mean":
        text.pooling = "mean"
    elif spoil == "no mask":
        encoded = text.encode
        text.encode = lambda input_ids, attention_mask: encoded(input_ids, torch.ones_like(attention_mask))
    elif spoil == "linear part":
        text.projection[1] = torch.nn.Identity()
    elif spoil == "four heads":
        for layer in text.model.encoder.layer:
            layer.attention.self.num_attention_heads, layer.attention.self.attention_head_size = 4, 32
            layer.attention.self.scaling = 32**-0.5
    else:
        for layer in text.model.encoder.layer:
            layer.intermediate.intermediate_act_fn = torch.nn.Tanh()
    assert np.abs(ours(text) - text_features(model, folder)).max() > 100 * TOLERANCE


def test_a_mean_and_a_linear_projection_are_read_too(tmp_path: Path) -> None:
    model = written(tmp_path, hf_proj_type="linear", hf_pooler_type="mean_pooler")
    folder = tmp_path / "clip"
    text = text_tower_of(folder, load_tower(folder))
    np.testing.assert_allclose(ours(text), text_features(model, folder), atol=TOLERANCE, rtol=0)


def test_what_is_not_read_is_refused_in_a_line(
    biomedclip: tuple[Path, "open_clip.CLIP"], tmp_path: Path
) -> None:
    folder = shutil.copytree(biomedclip[0], tmp_path / "clip")
    tower = load_tower(folder)
    with pytest.raises(
        IncompatibleTowerError, match="its image tower is a ViT: expected a CLIP ViT; `to=vision`"
    ):
        convert_tower(folder, tmp_path / "whole", to="clip")

    config = folder / "open_clip_config.json"
    said = json.loads(config.read_text())
    said["model_cfg"]["text_cfg"]["hf_pooler_type"] = "cls_pooler"
    config.write_text(json.dumps(said))
    with pytest.raises(
        UnsupportedCheckpointError, match="field 'hf_pooler_type' is 'cls_pooler': expected 'cls_last"
    ):
        text_tower_of(folder, tower)
    shutil.copy(biomedclip[0] / config.name, config)

    weights = folder / "open_clip_pytorch_model.bin"
    state = torch.load(weights)
    torch.save(
        {k: v for k, v in state.items() if "text.transformer.encoder.layer.1.output.dense" not in k}, weights
    )
    with pytest.raises(
        UnsupportedCheckpointError, match=r"the text tower is not a BERT: .*layer\.1\.output\.dense"
    ):
        text_tower_of(folder, tower)
    torch.save({k: v for k, v in state.items() if "word_embeddings" not in k}, weights)
    with pytest.raises(
        BadDataError, match=r"lacks 'embeddings\.word_embeddings\.weight': expected a whole BERT"
    ):
        text_tower_of(folder, tower)
    roberta = "text.transformer.embeddings.token_type_embeddings.weight"
    torch.save({**state, roberta: state[roberta][:1]}, weights)
    with pytest.raises(UnsupportedCheckpointError, match="has 1 token types: expected 2, as a BERT has"):
        text_tower_of(folder, tower)
    torch.save(state, weights)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(NotFoundError, match=r"has no tokenizer_config\.json: copy the tokenizer of"):
        text_tower_of(folder, tower)
