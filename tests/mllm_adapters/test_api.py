"""The Python API of mllm_adapters as a user calls it: plan, look, write, load, check, undo, retrain."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mgll_encoder.common.errors import (
    BadDataError,
    InvalidArgumentError,
    NotFoundError,
    OutputTakenError,
    UnknownNameError,
)
from mgll_encoder.common.progress import show_with
from mllm_adapters import (
    align,
    compose,
    convert,
    estimate_memory,
    extract,
    finetune_lora,
    list_families,
    load_mllm,
    plan_swap,
    restore,
    retrain_projector,
    verify,
)
from mllm_adapters.cli.swap import main as swap_encoder
from tests import builders
from tests.mllm_adapters.llava_checkpoints import a_tower, original_llava


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tensors(folder: Path) -> dict[str, bytes]:
    found = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    return {name: value.numpy().tobytes() for name, value in found.items()}


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tower(tmp_path_factory.mktemp("towers") / "mgll-fundus")


@pytest.fixture(scope="module")
def photographs_of_noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(12):
        Image.effect_noise((40, 40), 40 + 10 * number).convert("RGB").save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def conversations(photographs_of_noise: Path) -> Path:
    rows = [
        {
            "id": str(number),
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "noise"},
            ],
        }
        for number in range(4)
    ]
    file = photographs_of_noise / "train.json"
    file.write_text(json.dumps(rows))
    return file


def test_a_plan_is_read_before_anything_is_written(tiny_llava: Path, tower: Path, tmp_path: Path) -> None:
    plan = plan_swap(tiny_llava, tower)
    said = plan.report()
    assert "Input of the language model" in said
    assert "multi_modal_projector.linear_1: kept" in said
    assert plan.name == "tiny-llava-mgll-fundus"
    assert plan.plan.after.tokens == 4
    assert list(tmp_path.iterdir()) == []


def test_what_the_api_writes_is_what_the_command_writes(
    tiny_llava: Path, tower: Path, tmp_path: Path
) -> None:
    written = plan_swap(str(tiny_llava), str(tower), image_size=56).write(tmp_path / "api")
    typed = ("--mllm", tiny_llava, "--encoder", tower, "--image-size", 56, "--out", tmp_path / "cli")
    assert builders.invoke(swap_encoder, *typed).code == 0
    assert contents(written) == contents(tmp_path / "cli")
    reference = plan_swap(tiny_llava, tower, image_size=56).write_delta(tmp_path / "delta")
    assert builders.invoke(swap_encoder, *typed[:-1], tmp_path / "cli-delta", "--delta-only").code == 0
    assert contents(reference) == contents(tmp_path / "cli-delta")


def test_a_delta_is_composed_and_extracted_again(tiny_llava: Path, tower: Path, tmp_path: Path) -> None:
    plan = plan_swap(tiny_llava, tower, image_size=56)
    whole, delta = plan.write(tmp_path / "whole"), plan.write_delta(tmp_path / "delta")
    bars: list[tuple[str, int]] = []
    done: list[int] = []

    @contextmanager
    def bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
        bars.append((description, total))
        yield done.append

    show_with(None, byte_counter=bar)
    try:
        composed = compose(delta, tmp_path / "composed", mllm=tiny_llava)
    finally:
        show_with(None)
    assert tensors(composed) == tensors(whole)
    assert bars == [("Writing", sum(done))]
    extracted = extract(whole, tiny_llava, tmp_path / "extracted")
    assert tensors(extracted) == tensors(delta)
    with pytest.raises(OutputTakenError):
        compose(delta, composed, mllm=tiny_llava)
    with pytest.raises(NotFoundError):
        compose(whole, tmp_path / "again")


def test_memory_is_estimated_without_data(tiny_llava: Path) -> None:
    found = estimate_memory(tiny_llava, stage="lora", batch_size=2, max_length=64)
    assert found
    assert all(place.device > 0 for place in found.values())
    twice = estimate_memory(tiny_llava, stage="lora", batch_size=4, max_length=64)
    assert all(twice[name].activations > place.activations for name, place in found.items())
    with pytest.raises(InvalidArgumentError) as refused:
        estimate_memory(tiny_llava, batch_size=0)
    assert refused.value.arguments == ("batch_size",)


@torch.no_grad()
def test_a_plan_loads_without_being_written(tiny_llava: Path, tower: Path, tmp_path: Path) -> None:
    plan = plan_swap(tiny_llava, tower)
    loaded, processor = plan.load()
    written, of_folder = load_mllm(plan.write(tmp_path / "out"))
    given = processor(text="USER: <image>\nWhat? ASSISTANT:", images=Image.new("RGB", (40, 40), "red"),
                      return_tensors="pt")  # fmt: skip
    again = of_folder(text="USER: <image>\nWhat? ASSISTANT:", images=Image.new("RGB", (40, 40), "red"),
                      return_tensors="pt")  # fmt: skip
    assert torch.equal(given["pixel_values"], again["pixel_values"])
    assert torch.equal(loaded(**given).logits, written(**again).logits)
    assert loaded.generation_config.to_dict() == written.generation_config.to_dict()


def test_connectors_are_fitted_on_images_before_writing(
    tiny_llava: Path, tower: Path, photographs_of_noise: Path, tmp_path: Path
) -> None:
    plan = align(plan_swap(tiny_llava, tower), photographs_of_noise, device="cpu")
    assert plan.alignment is not None
    assert plan.alignment.used == 12
    assert "fitted on 12 images" in plan.report()
    typed = (
        "--mllm",
        tiny_llava,
        "--encoder",
        tower,
        "--align",
        photographs_of_noise,
        "--device",
        "cpu",
    )
    assert builders.invoke(swap_encoder, *typed, "--out", tmp_path / "cli").code == 0
    found = tensors(plan.write(tmp_path / "api"))
    assert found == tensors(tmp_path / "cli")
    assert found != tensors(plan_swap(tiny_llava, tower).write(tmp_path / "plain"))


def test_a_swap_is_verified_and_undone(tiny_llava: Path, tower: Path, tmp_path: Path) -> None:
    swapped = plan_swap(tiny_llava, tower).write(tmp_path / "swapped")
    checks = verify(swapped, encoder=tower, mllm=tiny_llava)
    assert all(check.passed for check in checks), checks
    again = restore(swapped, tmp_path / "again", mllm=tiny_llava)
    assert tensors(again) == tensors(tiny_llava)
    own = restore(swapped, tmp_path / "tower")
    assert (own / "mgll_tower.json").is_file()


def test_an_original_layout_is_converted(golden: Path, tmp_path: Path) -> None:
    source = original_llava(golden, "llava", tmp_path / "original")
    out = convert(source, tmp_path / "converted")
    assert builders.invoke(swap_encoder, "convert", "--mllm", source, "--out", tmp_path / "cli").code == 0
    assert contents(out) == contents(tmp_path / "cli")


def test_a_projector_is_retrained_and_a_language_model_fine_tuned(
    tiny_llava: Path, tower: Path, conversations: Path, photographs_of_noise: Path, tmp_path: Path
) -> None:
    swapped = plan_swap(tiny_llava, tower).write(tmp_path / "swapped")
    settings = {"max_steps": 1, "batch_size": 2, "report_to": [], "workers": 0}
    retrained = retrain_projector(swapped, conversations, photographs_of_noise, **settings)
    assert retrained.out == tmp_path / "swapped-aligned"
    assert retrained.steps == 1
    tuned = finetune_lora(retrained.out, conversations, photographs_of_noise, merge=True, rank=2, **settings)
    assert tuned.out == tmp_path / "swapped-aligned-lora"
    load_mllm(tuned.merged)
    with pytest.raises(BadDataError, match="max_stepps"):
        retrain_projector(swapped, conversations, photographs_of_noise, max_stepps=1)


def test_families_are_listed() -> None:
    found = {row.family: row for row in list_families()}
    assert found["llava-med"].checkpoint == "microsoft/llava-med-v1.5-mistral-7b"


def test_mistakes_are_exceptions_of_one_kind(tiny_llava: Path, tower: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nope does not exist"):
        plan_swap(tiny_llava, "nope")
    with pytest.raises(UnknownNameError, match=r"lava-med.*llava-med"):
        plan_swap("lava-med", tower)
    with pytest.raises(UnknownNameError, match="ovn"):
        plan_swap(tiny_llava, tower, layout="ovn")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputTakenError, match="taken"):
        plan_swap(tiny_llava, tower).write(tmp_path / "taken")
