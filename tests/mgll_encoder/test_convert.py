"""``mgll-encoder convert --to``: a tower with its text tower in the libraries of others, with the same numbers."""

import json
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, pipeline

from mgll_encoder import Tower, UserError, build_model, convert_tower, image_transform, load_tower, save_tower
from mgll_encoder.cli import main
from mgll_encoder.common.errors import IncompatibleTowerError, UnknownNameError
from mgll_encoder.common.trained_on import Training, trainings_of
from mgll_encoder.paired.read import text_tower_of
from mgll_encoder.pretraining.dual_encoder import TOWER_SIZES
from mgll_encoder.text.clip_tokenizer import clip_tokenizer, numbered_anew, trimmed_tokenizer
from mgll_encoder.text.text_tower import TextTower
from mgll_encoder.tower.card import alone, model_card
from tests.builders import invoke
from tests.mgll_encoder.test_clip_init import whole_clip
from tests.mgll_encoder.test_encoders import saved
from tests.mgll_encoder.test_text_tower import bert_folder
from tests.mgll_encoder.towers import scramble, state_of, write

LABELS = ["normal", "severe glaucoma", "drusen, left eye"]
SPEC = TOWER_SIZES["tiny"].spec.model_copy(update={"depth": 2, "image_size": 32, "projection_dim": 24})
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def trained_tower(folder: Path) -> Path:
    """What ``pretrain`` writes: a tower with its small text tower, squashed pixels, ImageNet mean."""
    torch.manual_seed(0)
    text = scramble(TextTower.new(LABELS, width=64, depth=2, shared=24))
    text.temperature = 0.031
    tower = Tower.from_model(scramble(build_model(SPEC)), SPEC, torch.randn(24, SPEC.width) * 0.05)
    record = {"layout": "model in memory"}
    training = Training.of(("tower",), "pretrain", ["ab" * 32])
    return save_tower(tower, folder, False, record, text, (training,))


def a_photograph() -> Image.Image:
    """A picture of soft colors, oblong."""
    values = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((97, 63), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_tower(tmp_path_factory.mktemp("t") / "tower")


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return a_photograph()


def our_scores(folder: Path, image: Image.Image) -> torch.Tensor:
    """Probabilities of the labels, as ``zero-shot`` computes them."""
    tower = load_tower(folder)
    text = text_tower_of(folder, tower)
    with torch.no_grad():
        pixels = image_transform(tower.spec)(image)[None]
        seen = normalize(tower.pooled(pixels) @ tower.projection.T, dim=1)
        return ((seen @ normalize(text.features(LABELS), dim=1).T) / text.temperature).softmax(dim=1)[0]


def stock_scores(folder: Path, image: Image.Image) -> torch.Tensor:
    classify = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    found = classify(image, candidate_labels=LABELS, hypothesis_template="{}")
    scores = {row["label"]: row["score"] for row in found}
    return torch.tensor([scores[label] for label in LABELS])


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_stock_pipeline_classifies_as_zero_shot_does(trained, photograph, tmp_path) -> None:
    convert_tower(trained, tmp_path / "clip", to="clip")
    ours = our_scores(trained, photograph)
    assert ours.max() - ours.min() > 0.1
    torch.testing.assert_close(stock_scores(tmp_path / "clip", photograph), ours, atol=1e-6, rtol=0)
    _, report = CLIPModel.from_pretrained(tmp_path / "clip", output_loading_info=True)
    assert not any(report.values()), report
    pixels = tmp_path / "clip" / "preprocessor_config.json"
    kept = pixels.read_text()
    change(pixels, size={"shortest_edge": 32}, do_center_crop=True)
    assert (stock_scores(tmp_path / "clip", photograph) - ours).abs().max() > 1e-4, (
        "squash or crop is the same"
    )
    pixels.write_text(kept)
    settings = json.loads((tmp_path / "clip" / "config.json").read_text())
    settings["vision_config"]["hidden_act"] = "quick_gelu"
    (tmp_path / "clip" / "config.json").write_text(json.dumps(settings))
    assert (stock_scores(tmp_path / "clip", photograph) - ours).abs().max() > 1e-5, (
        "any activation is the same"
    )


def test_the_processor_of_the_folder_gives_what_the_tower_was_trained_on(
    trained, photograph, tmp_path
) -> None:
    convert_tower(trained, tmp_path / "clip", to="clip")
    batch = AutoProcessor.from_pretrained(tmp_path / "clip")(
        images=photograph, text=LABELS, return_tensors="pt", padding=True
    )
    assert torch.equal(batch["pixel_values"][0], image_transform(SPEC)(photograph))
    assert batch["input_ids"].shape[0] == 3


def opened(folder: Path):
    """What open_clip makes of a folder: model, preprocessing, tokenizer."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


def test_open_clip_gives_the_same_features_from_its_own_folder(trained, photograph, tmp_path) -> None:
    convert_tower(trained, tmp_path / "oc", to="open-clip")
    model, preprocess, tokenizer = opened(tmp_path / "oc")
    tower = load_tower(trained)
    with torch.no_grad():
        image = model.encode_image(PIXELS)
        torch.testing.assert_close(image, tower.pooled(PIXELS) @ tower.projection.T, atol=1e-6, rtol=0)
        texts = model.encode_text(tokenizer(LABELS))
        torch.testing.assert_close(texts, text_tower_of(trained, tower).features(LABELS), atol=1e-6, rtol=0)
    assert model.logit_scale.item() == pytest.approx(-math.log(0.031))
    # Pillow and torchvision round the resized bytes differently
    apart = (preprocess(photograph) - image_transform(SPEC)(photograph)).abs()
    assert apart.max() < 2 / 255 / 0.224
    cropped = image_transform(SPEC.model_copy(update={"resize": "crop"}))(photograph)
    assert (preprocess(photograph) - cropped).abs().mean() > 10 * apart.mean()
    settings = json.loads((tmp_path / "oc" / "open_clip_config.json").read_text())
    settings["model_cfg"]["quick_gelu"] = True
    (tmp_path / "oc" / "open_clip_config.json").write_text(json.dumps(settings))
    with torch.no_grad():
        assert (opened(tmp_path / "oc")[0].encode_image(PIXELS) - image).abs().max() > 1e-4


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_published_clip_keeps_its_features_in_both_forms(tmp_path, quick_gelu) -> None:
    model = whole_clip(quick_gelu)
    file = write(state_of(model), tmp_path / "clip.pt")
    word = "quick_gelu" if quick_gelu else "gelu"
    for form in ("clip", "open-clip"):
        assert not convert_tower(file, tmp_path / form, to=form, activation=word).warnings[1:]
    pixels = PIXELS[..., :28, :28]
    again, _, tokenizer = opened(tmp_path / "open-clip")
    stock = CLIPModel.from_pretrained(tmp_path / "clip")
    theirs = open_clip.tokenizer.SimpleTokenizer(context_length=16)(LABELS)
    with torch.no_grad():
        images, texts = model.encode_image(pixels), model.encode_text(theirs)
        assert torch.equal(again.encode_image(pixels), images)
        assert torch.equal(again.encode_text(tokenizer(LABELS)), texts)
        batch = clip_tokenizer()(LABELS, padding=True, return_tensors="pt")
        found = stock(pixel_values=pixels, **batch)
    torch.testing.assert_close(found.image_embeds, normalize(images, dim=1), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.text_embeds, normalize(texts, dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["clip", "open-clip"])
def test_this_projects_commands_read_what_was_written(trained, photograph, tmp_path, form) -> None:
    done = convert_tower(trained, tmp_path / "out", to=form)
    assert len(done.warnings) == 1
    assert "zero embedding in the folder" in done.warnings[0]
    tower = load_tower(tmp_path / "out")
    assert tower.header.warnings == ()
    assert tower.spec == load_tower(trained).spec
    assert text_tower_of(tmp_path / "out", tower).temperature == pytest.approx(0.031)
    ours = our_scores(trained, photograph)
    torch.testing.assert_close(our_scores(tmp_path / "out", photograph), ours, atol=1e-6, rtol=0)
    assert trainings_of(tmp_path / "out") == trainings_of(trained) != ()


def test_a_renumbered_vocabulary_cuts_texts_as_before() -> None:
    trimmed, rows = trimmed_tokenizer(LABELS)
    new, former = numbered_anew(trimmed, rows)
    for text in (*LABELS, "a word that nobody trained on"):
        assert [former[i] for i in new(text)["input_ids"]] == [
            i if i < rows else None for i in trimmed(text)["input_ids"]
        ]
    assert new.eos_token_id == max(new.get_vocab().values())


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_the_card_says_what_the_folder_does(trained, tmp_path) -> None:
    assert "pipeline_tag: image-feature-extraction" in card(trained)
    assert "--to clip" in card(trained)
    for form, library in (("clip", "transformers"), ("open-clip", "open_clip")):
        text = card(convert_tower(trained, tmp_path / form, to=form).out)
        assert f"library_name: {library}\npipeline_tag: zero-shot-image-classification\n" in text
    alone = convert_tower(trained, tmp_path / "alone").out
    assert "pipeline_tag: image-feature-extraction" in card(alone)
    assert "text tower" not in card(alone)
    features = pipeline("image-feature-extraction", model=str(alone), device="cpu")
    assert np.asarray(features(Image.new("RGB", (40, 32)))).shape == (1, 17, SPEC.width)


def refused(path: Path, place: Path, to: str, complaint: str, kind: type[UserError] = UserError) -> None:
    with pytest.raises(kind, match=complaint) as found:
        convert_tower(path, place / "refused", to=to)
    assert "\n" not in str(found.value)
    assert not (place / "refused").exists()


def test_what_no_clip_can_be_is_refused_with_what_to_take(trained, tmp_path) -> None:
    text = TextTower.pretrained(str(bert_folder(tmp_path / "bert")), shared=24)
    tower = load_tower(trained)
    save_tower(tower, tmp_path / "with-bert", text=text)
    wrong = (IncompatibleTowerError, "text tower is a 'bert': expected that of a CLIP; `to=vision`")
    refused(tmp_path / "with-bert", tmp_path, "clip", wrong[1], wrong[0])
    alone = convert_tower(trained, tmp_path / "alone").out
    refused(alone, tmp_path, "open-clip", "has no text tower: .*; `to=vision`")
    refused(
        trained, tmp_path, "open_clip", "unknown `to` 'open_clip': did you mean 'open-clip'", UnknownNameError
    )
    saved("dinov2", tmp_path / "dino")
    general = load_tower(tmp_path / "dino")
    joined = Tower.from_model(general.model, general.spec, torch.ones(24, general.spec.width))
    save_tower(joined, tmp_path / "joined", text=text_tower_of(trained, tower))
    refused(
        tmp_path / "joined", tmp_path, "clip", "image tower is a DINOv2: expected a CLIP ViT; `to=vision`"
    )
    config = CLIPTextConfig(
        vocab_size=len(LABELS) + 400, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        hidden_act="quick_gelu",
    )  # fmt: skip
    other = TextTower.new(LABELS, width=64, depth=1, shared=24)
    config.vocab_size, config.eos_token_id = other.rows, other.tokenizer.eos_token_id
    mixed = TextTower(CLIPTextModel(config), other.tokenizer, other.projection, "end")
    save_tower(tower, tmp_path / "mixed", text=mixed)
    convert_tower(tmp_path / "mixed", tmp_path / "mixed-clip", to="clip")
    refused(
        tmp_path / "mixed", tmp_path, "open-clip", "'activation' of this CLIP, gelu, quick_gelu: .*`to=clip`",
        IncompatibleTowerError,
    )  # fmt: skip


def test_a_user_types_it_and_reads_the_option_in_a_refusal(trained, tmp_path) -> None:
    done = invoke(main, "convert", trained, "--to", "clip", "--out", tmp_path / "clip")
    assert done.code == 0, done.err
    assert (
        f"Next: mgll-encoder zero-shot --data labels.csv --images images --encoder {tmp_path / 'clip'}"
        in done.out
    )
    alone = convert_tower(trained, tmp_path / "alone").out
    save_tower(
        load_tower(alone), tmp_path / "again", text=TextTower.pretrained(str(bert_folder(tmp_path / "b")), 24)
    )
    done = invoke(main, "convert", tmp_path / "again", "--to", "clip", "--out", tmp_path / "no")
    assert done.code == 2
    assert "--to vision writes the image tower alone" in done.err


def test_a_control_is_titled_after_its_loss_however_often_it_is_converted(trained, tmp_path) -> None:
    tower = load_tower(trained)
    for loss, title in (("clip", "CLIP"), ("mgll", "MGLL")):
        spec = model_card(
            tower.spec, {"layout": "x", "made_from": {"pretraining": {"loss": loss}}}, alone(SPEC, False)
        )
        assert f"\n# {title} vision tower\n" in spec
    again = convert_tower(convert_tower(trained, tmp_path / "a").out, tmp_path / "b").out
    record = json.loads((again / "mgll_tower.json").read_text())["provenance"]
    assert record["made_from"]["made_from"]["layout"] == "model in memory"
    assert "\n# CLIP ViT vision tower\n" in card(again)
