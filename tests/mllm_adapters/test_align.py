"""Somebody swaps a tower with --align: what was fitted, what it is worth, and what is refused."""

import json
import math
import random
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionModel

from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import BadDataError
from mgll_encoder.tower.spec import PixelRule
from mllm_adapters import load_mllm
from mllm_adapters.alignment.align import Alignment, align, fitted_plan
from mllm_adapters.alignment.feature_pairs import find_images, match
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.cli.swap import main as swap_encoder
from mllm_adapters.core.contract import Family
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.families.llava import LLAVA, Llava
from mllm_adapters.swap.apply import apply_plan
from tests.builders import invoke, picture, refused, sparse_checkpoint, tower_config
from tests.eval_mcq.helpers import small_bench

CONNECTOR = "multi_modal_projector.linear_1"


def drawn_pictures(folder: Path, number: int) -> Path:
    """Colored boxes, of any shape; half of them one folder deeper."""
    draw = random.Random(0)
    for i in range(number):
        image = Image.new("RGB", (draw.randint(30, 60), draw.randint(30, 60)), "grey")
        for _ in range(8):
            left, top = draw.randint(0, 30), draw.randint(0, 30)
            color = tuple(draw.randint(0, 255) for _ in range(3))
            image.paste(color, (left, top, left + draw.randint(5, 25), top + draw.randint(5, 25)))
        path = folder / ("deeper" if i % 2 else ".") / f"{i}.{'PNG' if i % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn_pictures(tmp_path_factory.mktemp("align") / "images", 120)


def written_tower(
    folder: Path, state: dict[str, Tensor] | None = None, resize: str = "squash", **changes: Any
) -> Path:
    """A tower folder of random weights, or of these."""
    torch.manual_seed(7)
    tower = CLIPVisionModel(tower_config(**changes))
    if state is not None:
        tower.load_state_dict(state)
    tower.save_pretrained(folder)
    side = {"height": 28, "width": 28}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": side, "crop_size": side, "do_center_crop": False, "do_pad": resize == "pad"})
    )
    return folder


def own_tower(llava: Path) -> dict[str, Tensor]:
    model = AutoModelForImageTextToText.from_pretrained(llava)
    return {name: value.clone() for name, value in model.model.vision_tower.state_dict().items()}


def permuted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tower with its features in another order: a rotation that its normalizations do not notice."""
    width = len(state[next(n for n in state if n.endswith("class_embedding"))])
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    turned = {}
    for name, value in state.items():
        inner = any(part in name for part in ("q_proj", "k_proj", "v_proj", "fc1"))
        if (inner and value.ndim == 2) or name.endswith("position_embedding.weight"):
            value = value[:, order]
        elif not inner and "position_ids" not in name:
            value = value[order]
        turned[name] = value
    return turned


@dataclass(frozen=True)
class Swap:
    """An aligned swap."""

    alignment: Alignment
    folder: Path


def logits(folder: Path) -> Tensor:
    """What a model says to a prompt about a picture."""
    model, processor = load_mllm(folder, dtype=torch.float32)
    image = Image.new("RGB", (40, 40), "red")
    image.paste("blue", (3, 5, 30, 20))
    given = processor(text="USER: <image>\nWhat? ASSISTANT:", images=[image], return_tensors="pt")
    with torch.no_grad():
        return model(**given).logits


def swap(
    source: Path, tower: Path, images: Path, out: Path, family: Family | None = None, **options: Any
) -> Swap:
    checkpoint, found, _ = open_checkpoint(source)
    family = family or found
    plan = family.plan(checkpoint, inspect_tower(tower))
    alignment = align(plan, family, checkpoint, images, **options)
    apply_plan(fitted_plan(plan, family, checkpoint), family, checkpoint, out, fitted=alignment.tensors)
    return Swap(alignment, out)


def test_the_same_tower_gives_the_same_connector(tiny_llava: Path, images: Path, tmp_path: Path) -> None:
    tower = written_tower(tmp_path / "tower", own_tower(tiny_llava))
    found = swap(tiny_llava, tower, images, tmp_path / "out")
    (fit,) = found.alignment.fits
    assert fit.r2 == pytest.approx(1, abs=1e-4)
    stored = load_file(tiny_llava / "model.safetensors")
    for kind in ("weight", "bias"):
        before = next(value for name, value in stored.items() if name.endswith(f"{CONNECTOR}.{kind}"))
        after = next(
            value for name, value in found.alignment.tensors.items() if name.endswith(f"{CONNECTOR}.{kind}")
        )
        torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(found.folder), logits(tiny_llava), atol=1e-3, rtol=0)


def test_features_in_another_order_are_put_back(tiny_llava: Path, images: Path, tmp_path: Path) -> None:
    tower = written_tower(tmp_path / "tower", permuted(own_tower(tiny_llava)))
    found = swap(tiny_llava, tower, images, tmp_path / "out")
    (fit,) = found.alignment.fits
    assert fit.r2 > 0.999
    assert fit.r2_unaligned is not None
    assert fit.r2_unaligned < 0.5
    expected = logits(tiny_llava)
    torch.testing.assert_close(logits(found.folder), expected, atol=0.02, rtol=0)
    checkpoint, family, _ = open_checkpoint(tiny_llava)
    apply_plan(family.plan(checkpoint, inspect_tower(tower)), family, checkpoint, tmp_path / "plain")
    assert (logits(tmp_path / "plain") - expected).abs().max() > 0.1, "negative control: not aligned"


@dataclass(frozen=True)
class Mixed(Llava):
    """A LLaVA family that shows the new model another picture than the old one."""

    def encode_images(self, model: Any, pixels: Tensor, contract: Any) -> None:
        new = model.config.vision_config.hidden_size == 16
        super().encode_images(model, pixels.roll(3, 0) if new else pixels, contract)


def test_other_pictures_explain_nothing_and_it_says_so(
    tiny_llava: Path, images: Path, tmp_path: Path
) -> None:
    tower = written_tower(tmp_path / "tower", hidden_size=16)
    mixed = Mixed(LLAVA.spec, LLAVA.chat_template, owns_native_layout=True)
    found = swap(tiny_llava, tower, images, tmp_path / "mixed", mixed).alignment
    right = swap(tiny_llava, tower, images, tmp_path / "right").alignment
    assert found.fits[0].r2 < 0.1
    assert any("alignment did not work" in line for line in found.warnings())
    assert right.fits[0].r2 > found.fits[0].r2 + 0.2
    assert right.fits[0].r2_unaligned is None, "the connector's width changes: it would be drawn anew"


def test_the_images_of_a_bench_serve_as_well_as_a_folder(tmp_path: Path) -> None:
    """So that those of the training questions can be taken: others would be seen before they are asked about."""
    bench = small_bench(tmp_path)
    picture(tmp_path, "not asked about.png")
    assert {file.name for file in find_images(bench, 500)} == {f"{i}.png" for i in range(10)}
    bench.write_text(bench.read_text().replace('"question"', '"asked"'))
    with pytest.raises(BadDataError, match=r"bench\.jsonl line 2: .*question"):
        find_images(bench, 500)


def test_where_the_old_tower_saw_nothing_nothing_is_fitted() -> None:
    side, old_side = 4, 6
    centers = (torch.arange(old_side) + 0.5) / old_side * 2 - 1
    places = torch.stack(torch.meshgrid(centers, centers, indexing="ij"), -1).flatten(0, 1)[None]
    # A picture twice as wide as high: the new tower is shown all of it, the old one the square in its middle.
    pairs = match(torch.zeros(1, side**2, 1), places, torch.tensor([[2.0, 1.0]]))
    seen = pairs.seen.view(side, side)
    assert seen[:, [1, 2]].all()
    assert not seen[:, [0, 3]].any()
    found = pairs.old.view(side, side, 2)[:, 1]
    torch.testing.assert_close(found[1:3, 0], torch.tensor([-0.25, 0.25]))
    torch.testing.assert_close(
        found[:, 1], torch.full((side,), -0.5), msg="x of the second column, twice as far out"
    )


def test_class_tokens_are_matched_with_class_tokens() -> None:
    new, old = torch.zeros(2, 5, 3), torch.arange(2 * 10 * 1.0).view(2, 10, 1)
    pairs = match(new, old, torch.ones(2, 2))
    assert pairs.old.shape == (2, 5, 1)
    assert pairs.old[:, 0].flatten().tolist() == [0, 10]
    without = match(new[:, 1:], old, torch.ones(2, 2))
    torch.testing.assert_close(without.old, pairs.old[:, 1:])


def test_no_tensor_of_the_language_model_is_read(
    tiny_llava: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.append(name) or original(self, name))
    checkpoint, family, _ = open_checkpoint(tiny_llava)
    plan = family.plan(checkpoint, inspect_tower(written_tower(tmp_path / "tower")))
    align(plan, family, checkpoint, images, samples=20)
    assert any("vision_tower" in name for name in read)
    assert not [name for name in read if "language_model" in name or "lm_head" in name]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_language_model(tiny_llava: Path, images: Path, tmp_path: Path) -> None:
    """A language model of 7B, whose values are a hole in the file, 13 GB of it."""
    source, small = tmp_path / "large", json.loads((tiny_llava / "config.json").read_text())
    text = {**small["text_config"], "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "layer_types": None}
    config = {**small, "text_config": text}
    fields = dict(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields)
        )
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    source.mkdir()
    seeing = {n: torch.randn(s) * 0.05 for n, s in shapes.items() if "vision" in n or "projector" in n}
    save_file(seeing, source / "model-1.safetensors")
    header, end = {}, 0
    for name, shape in shapes.items():
        if name not in seeing:
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with (source / "model-2.safetensors").open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + end)
    files = {name: f"model-{1 if name in seeing else 2}.safetensors" for name in shapes}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (source / "config.json").write_text(json.dumps(config))
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (tiny_llava / name).is_file():
            (source / name).write_text((tiny_llava / name).read_text())
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint, inspect_tower(written_tower(tmp_path / "tower")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    align(plan, family, checkpoint, images, samples=20)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 5e8, f"peak memory grew by {grown / 1e6:.0f} MB"


class TestCommand:
    def test_it_says_how_well_it_went_and_retraining_starts_from_it(
        self, tiny_llava: Path, images: Path, tmp_path: Path
    ) -> None:
        tower, out = written_tower(tmp_path / "tower"), tmp_path / "out"
        (images.parent / "broken").mkdir(exist_ok=True)
        broken = images / "broken.png"
        broken.write_bytes(b"no picture")
        try:
            outcome = invoke(
                swap_encoder, "--mllm", tiny_llava, "--encoder", tower, "--out", out, "--align", images
            )
        finally:
            broken.unlink()
        assert outcome.code == 0, outcome.err
        assert "Connectors fitted on 120 images (24 of them held out), 384 tokens" in " ".join(
            outcome.out.split()
        )
        assert "left out 1 of 121 images: 1 image unreadable" in outcome.err
        record = json.loads((out / "mgll_swap.json").read_text())
        (connector,) = record["plan"]["alignment"]["connectors"]
        assert connector["connector"].endswith(CONNECTOR)
        assert 0 < connector["r2"] <= 1
        assert record["plan"]["alignment"]["used"] == 120
        assert record["plan"]["alignment"]["unreadable"] == 1
        assert "fitted on 120 images, held-out R²" in (out / "README.md").read_text()
        data = [
            {
                "id": "1",
                "image": "a.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat?"},
                    {"from": "gpt", "value": "A disc."},
                ],
            }
        ]
        (tmp_path / "train.json").write_text(json.dumps(data))
        picture(tmp_path, "a.png")
        given = ("--model", out, "--data", tmp_path / "train.json", "--images", tmp_path, "--dry-run")
        assert invoke(retrain_projector, *given).code == 0

    @pytest.mark.parametrize(
        ("number", "options", "message"),
        [
            (None, [], "does not exist: give a folder of images"),
            (0, [], "holds 0 image files"),
            (4, [], "at least 10 are needed"),
            (12, ["--align-samples", "3"], "--align-samples is 3: at least 10 are needed"),
            (12, ["--device", "gpu7"], "unknown --device 'gpu7'"),
        ],
    )
    def test_what_cannot_work_is_refused(
        self, tiny_llava: Path, tmp_path: Path, number: int | None, options: list[str], message: str
    ) -> None:
        tower, folder = written_tower(tmp_path / "tower"), tmp_path / "images"
        if number is not None:
            folder.mkdir()
            drawn_pictures(folder, number)
        line = refused(
            swap_encoder,
            "--mllm",
            tiny_llava,
            "--encoder",
            tower,
            "--out",
            tmp_path / "out",
            "--align",
            folder,
            *options,
        )
        assert message in line
        assert not (tmp_path / "out").exists()

    def test_its_options_go_with_it(self, tiny_llava: Path, tmp_path: Path) -> None:
        tower = written_tower(tmp_path / "tower")
        line = refused(swap_encoder, "--mllm", tiny_llava, "--encoder", tower, "--align-samples", 50)
        assert "--align-samples" in line
        assert "requires --align IMAGES" in line

    def test_images_that_cannot_be_read_are_no_images(self, tiny_llava: Path, tmp_path: Path) -> None:
        folder = tmp_path / "images"
        folder.mkdir()
        for i in range(12):
            (folder / f"{i}.png").write_bytes(b"no picture")
        tower = written_tower(tmp_path / "tower")
        line = refused(
            swap_encoder,
            "--mllm",
            tiny_llava,
            "--encoder",
            tower,
            "--out",
            tmp_path / "out",
            "--align",
            folder,
        )
        assert "0 readable images are too few" in line
        assert "expected PNG, JPEG, TIFF" in line

    def test_the_old_tower_is_needed(self, golden: Path, images: Path, tmp_path: Path) -> None:
        """A swap needs no more of a published tower than its geometry; alignment needs its weights."""
        published, original = "openai/clip-vit-large-patch14", Checkpoint(golden / "llava" / "checkpoint")
        config = {**original.config, "mm_vision_tower": published, "mm_hidden_size": 1024}
        shapes = {h.name: h.shape for h in original.tensors.values() if "vision_tower" not in h.name}
        shapes["model.mm_projector.0.weight"] = (*shapes["model.mm_projector.0.weight"][:-1], 1024)
        source = sparse_checkpoint(tmp_path / "llava", config, shapes)
        encoder = next((golden / "mgll_official").glob("*.pth"))
        given = ("--mllm", source, "--encoder", encoder, "--out", tmp_path / "out")
        assert invoke(swap_encoder, *given, "--dry-run").code == 0
        line = refused(swap_encoder, *given, "--align", images)
        assert line.startswith("--align needs the model as it was, tower and all")
        assert "--part vision-tower=PATH" in line


def test_rules_of_preprocessing_are_those_that_the_towers_have(
    tiny_llava: Path, images: Path, tmp_path: Path
) -> None:
    """A tower that pads sees margins; the host that squashes does not: these places count for nothing."""
    padded = written_tower(tmp_path / "padded", own_tower(tiny_llava), resize="pad")
    assert (
        PixelRule(**inspect_tower(padded).spec.model_dump(include=set(PixelRule.model_fields))).resize
        == "pad"
    )
    found = swap(tiny_llava, padded, images, tmp_path / "out").alignment
    assert found.tokens <= 96 * 4
    assert found.fits[0].r2 < 0.999, "what is shown is not the same"
