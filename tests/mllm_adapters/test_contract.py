"""The contract that every family and layout keeps: the original's numbers, and a swap that holds."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import mllm_adapters.auto  # noqa: F401
from eval_mcq.items.schema import MCQItem
from eval_mcq.scoring.score import Scorer
from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import UnsupportedCheckpointError
from mllm_adapters import load_mllm
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.core.stages import apply_stage
from mllm_adapters.core.values import fit, open_tower
from mllm_adapters.swap.apply import apply_plan
from tests.mllm_adapters import complete
from tests.mllm_adapters.complete_checks import QUESTION, asked, embedding, in_dtype, prompt, tied
from tests.mllm_adapters.families import (
    aya_vision,
    instructblip,
    internvl,
    janus_pro,
    llava,
    llava_qwen2,
    med_flamingo,
    mini_gemini,
    paligemma,
    qwen2_vl,
    qwen_vl,
)
from tests.mllm_adapters.families.case import Case, Golden

CASES = (
    *llava.CASES,
    *llava_qwen2.CASES,
    *qwen2_vl.CASES,
    *aya_vision.CASES,
    *paligemma.CASES,
    *internvl.CASES,
    *med_flamingo.CASES,
    *mini_gemini.CASES,
    *instructblip.CASES,
    *qwen_vl.CASES,
    *janus_pro.CASES,
)

LOADS_WITHOUT_US = """
import sys
from transformers import AutoModelForImageTextToText
_, report = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(report[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), report
assert not [m for m in sys.modules if m.split('.')[0] in ('mllm_adapters', 'mgll_encoder')]
"""


@dataclass(frozen=True)
class Swapped:
    """A golden checkpoint with the golden MGLL tower in it."""

    plan: Plan
    folder: Path
    encoder: Path
    model: Any

    def encode_images(self, case: Case, pixels: torch.Tensor) -> torch.Tensor:
        """Logits of a prompt about one image."""
        return self.model(**case.prompt(self.plan, pixels)).logits

    def picture(self) -> torch.Tensor:
        """Pixels of an image, always the same."""
        side = self.plan.after.image_size
        return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def golden_case(case: Case, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    if case.build:
        return case.build(tmp_path_factory.mktemp("golden") / case.name)
    if not (golden / case.golden).is_dir():
        pytest.skip(f"{golden} has no {case.golden}")
    return Golden(golden / case.golden)


@pytest.fixture(scope="module")
def parts(case: Case, golden_case: Golden) -> dict[str, Path]:
    return {name: golden_case.folder / path for name, path in (case.parts or {}).items()}


@pytest.fixture(scope="module")
def source(
    case: Case, golden_case: Golden, parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if not case.converted:
        return golden_case.folder
    checkpoint, family, _ = open_checkpoint(golden_case.folder, parts)
    parts.clear()  # the converted checkpoint is whole
    return apply_plan(
        family.plan(checkpoint), family, checkpoint, tmp_path_factory.mktemp("whole") / case.name
    )


@pytest.fixture(scope="module")
def original(source: Path, parts: dict[str, Path]) -> Any:
    model, processor = load_mllm(source, dtype=torch.float32, parts=parts)
    assert processor is None, "the golden folders hold no tokenizer"
    return model


@pytest.fixture(scope="module")
def swapped(
    case: Case,
    golden: Path,
    source: Path,
    parts: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Swapped:
    encoder = next((golden / "mgll_official").glob("*.pth"))
    checkpoint, family, _ = open_checkpoint(source, parts)
    plan = family.plan(checkpoint, inspect_tower(encoder), None, case.target)
    folder = apply_plan(plan, family, checkpoint, tmp_path_factory.mktemp("swap") / case.name)
    model, _ = load_mllm(folder, dtype=torch.float32)
    return Swapped(plan, folder, encoder, model)


class TestFamily:
    """Each row of `CASES` in turn."""

    @pytest.mark.usefixtures("golden_case")
    @torch.no_grad()
    def test_the_tower_gives_the_features_of_the_original(
        self, case: Case, original: Any, golden_case: Golden
    ) -> None:
        found, expected = case.features(original, golden_case), golden_case.expected["vision_features"]
        torch.testing.assert_close(found, expected, atol=case.tolerance, rtol=0)

    @torch.no_grad()
    def test_the_language_model_gets_the_visual_tokens_of_the_original(
        self, case: Case, original: Any, golden_case: Golden
    ) -> None:
        if case.tokens is None:
            pytest.skip("the golden vectors of this family hold no visual tokens apart from their sequences")
        found, expected = case.tokens(original, golden_case), golden_case.expected["visual_tokens"]
        torch.testing.assert_close(found, expected, atol=case.tolerance, rtol=0)

    @torch.no_grad()
    def test_the_logits_are_those_of_the_original(
        self, case: Case, original: Any, golden_case: Golden
    ) -> None:
        for sequence in case.sequences:
            given = dict(case.inputs(original, golden_case, sequence))
            found, expected = case.logits(original(**given).logits, golden_case, sequence)
            torch.testing.assert_close(found, expected, atol=case.tolerance, rtol=0)
            blank = {**given, "pixel_values": torch.zeros_like(given["pixel_values"])}
            other, _ = case.logits(original(**blank).logits, golden_case, sequence)
            assert (other - expected).abs().max() > 10 * case.tolerance, "negative control: without the image"

    @torch.no_grad()
    def test_saved_and_reloaded_it_is_the_same_model(
        self, case: Case, original: Any, golden_case: Golden, tmp_path: Path
    ) -> None:
        original.save_pretrained(tmp_path / "saved")
        reloaded, _ = load_mllm(tmp_path / "saved", dtype=torch.float32)
        given = case.inputs(original, golden_case, case.sequences[0])
        assert torch.equal(reloaded(**given).logits, original(**given).logits)

    def test_the_swapped_checkpoint_loads_with_an_empty_report(self, case: Case, swapped: Swapped) -> None:
        _, report = AutoModelForImageTextToText.from_pretrained(swapped.folder, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
            report
        )
        if case.stock:
            command = [sys.executable, "-c", LOADS_WITHOUT_US, str(swapped.folder)]
            subprocess.run(command, cwd="/", check=True, capture_output=True)

    def test_its_tower_is_the_encoder(self, case: Case, swapped: Swapped) -> None:
        tower = case.tower(swapped.model)
        assert type(tower).__name__ == "CLIPVisionModel"
        assert tower.config.hidden_act == swapped.plan.after.activation
        found = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
        tower_file = open_tower(swapped.plan)
        assert tower_file is not None
        state = {name: tower_file.read(name) for name in tower_file.tensors}
        expected = fit(state, tower_file.spec, swapped.plan.after)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.float(), atol=0, rtol=1e-3, msg=name)

    @torch.no_grad()
    def test_blanking_the_image_changes_the_answer(self, case: Case, swapped: Swapped) -> None:
        picture = swapped.picture()
        moved = swapped.encode_images(case, picture) - swapped.encode_images(case, torch.zeros_like(picture))
        assert torch.isfinite(moved).all()
        assert moved.abs().max() > 1e-3

    def test_it_generates(self, case: Case, swapped: Swapped) -> None:
        given = case.prompt(swapped.plan, swapped.picture())
        options = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
        cached = swapped.model.generate(**given, **options, use_cache=True)
        assert torch.equal(cached, swapped.model.generate(**given, **options, use_cache=False))
        assert cached.shape[1] >= 3

    def test_gradient_reaches_the_tower_only_when_it_is_trained(self, case: Case, swapped: Swapped) -> None:
        stage = apply_stage(swapped.model, "projector")
        tower = case.tower(swapped.model)
        assert stage.trainable > 0
        assert not any(parameter.requires_grad for parameter in tower.parameters())
        swapped.encode_images(case, swapped.picture()).square().mean().backward()
        assert all(parameter.grad is None for parameter in tower.parameters())
        names = set(stage.names)
        reached = [p.grad is not None for name, p in swapped.model.named_parameters() if name in names]
        assert any(reached), "the projector learns"
        tower.requires_grad_(True)
        swapped.encode_images(case, swapped.picture()).square().mean().backward()
        patches = tower.get_parameter(
            next(n for n, _ in tower.named_parameters() if n.endswith("patch_embedding.weight"))
        )
        assert patches.grad is not None
        assert patches.grad.abs().max() > 0
        swapped.model.zero_grad(set_to_none=True)

    def test_gradient_checkpointing_changes_nothing(self, case: Case, swapped: Swapped) -> None:
        apply_stage(swapped.model, "projector")
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                swapped.model.gradient_checkpointing_enable({"use_reentrant": False})
            swapped.model.train()
            torch.manual_seed(0)  # the same dropout both times
            swapped.encode_images(case, swapped.picture()).square().mean().backward()
            gradients.append({n: p.grad for n, p in swapped.model.named_parameters() if p.grad is not None})
            swapped.model.zero_grad(set_to_none=True)
        swapped.model.gradient_checkpointing_disable()
        swapped.model.eval()
        plain, recomputed = gradients
        assert plain.keys() == recomputed.keys()
        for name, value in plain.items():
            torch.testing.assert_close(recomputed[name], value, msg=name)

    def test_another_tower_can_follow(self, case: Case, swapped: Swapped, tmp_path: Path) -> None:
        if not case.reswap:
            pytest.skip("see the row")
        checkpoint, family, _ = open_checkpoint(swapped.folder)
        plan = family.plan(checkpoint, inspect_tower(swapped.encoder))
        assert plan.family == swapped.plan.family
        again = apply_plan(plan, family, checkpoint, tmp_path / "again")
        model, _ = load_mllm(again, dtype=torch.float32)
        with torch.no_grad():
            found = model(**case.prompt(plan, swapped.picture())).logits
            torch.testing.assert_close(
                found, swapped.encode_images(case, swapped.picture()), atol=1e-4, rtol=0
            )


UNASKED: Mapping[str, str] = {"instructblip-t5": "no letter scoring with an encoder-decoder"}
"""Rows of `complete.BUILDERS` that cannot be asked by letter -> why."""

OTHER_SIZES: Mapping[str, int] = {
    "mini-gemini": 14,
    **dict.fromkeys(("qwen2-vl", "qwen2_5-vl", "qwen3-vl"), 224),
}
"""Rows -> image size of a second swap, where twice the first one does not go with the host."""

PROMPTS = Path(__file__).parent / "prompts"

_INTERNVL = dict(
    part.split("\n", 1) for part in (PROMPTS / "internvl.txt").read_text(encoding="utf-8").split("=== ")[1:]
)

FROZEN: Mapping[str, str] = {
    "qwen-vl": (PROMPTS / "qwen_vl.txt").read_text(encoding="utf-8"),
    "instructblip": (PROMPTS / "instructblip.txt").read_text(encoding="utf-8").removesuffix("\n"),
    "internvl": _INTERNVL["qwen2"].removesuffix("\n"),
    "internvl-internlm2": _INTERNVL["internlm2"].removesuffix("\n"),
    "internvl-llama": _INTERNVL["llama"].removesuffix("\n"),
}
"""Rows whose snapshot is `QUESTION` about a picture -> the snapshot."""

NEVER_TIED = ("instructblip-t5",)


@dataclass(frozen=True)
class Whole:
    """A complete checkpoint, and what a swap makes of it."""

    name: str
    source: Path
    encoder: Path
    plan: Plan
    folder: Path


def swapped_folder(source: Path, encoder: Path | None, out: Path, size: int | None = None) -> Plan:
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint, inspect_tower(encoder) if encoder else None, size)
    apply_plan(plan, family, checkpoint, out)
    return plan


@pytest.fixture(scope="module", params=complete.BUILDERS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    source = complete.BUILDERS[request.param](folder / "host", lambda: request.getfixturevalue("golden"))
    encoder = complete.encoder(folder / "mgll")
    plan = swapped_folder(source, encoder, folder / "swapped")
    return Whole(request.param, source, encoder, plan, folder / "swapped")


class TestComplete:
    """Each row of `complete.BUILDERS` in turn: a checkpoint with its tokenizer and processor."""

    @torch.no_grad()
    def test_a_second_swap_keeps_the_processor(self, whole: Whole, tmp_path: Path) -> None:
        again = swapped_folder(whole.folder, whole.encoder, tmp_path / "again")
        assert (again.after, again.image_token_id) == (whole.plan.after, whole.plan.image_token_id)
        first, second = (AutoProcessor.from_pretrained(f) for f in (whole.folder, tmp_path / "again"))
        assert type(second) is type(first)
        assert second.chat_template == first.chat_template
        given, expected = asked(second), asked(first)
        assert given.keys() == expected.keys()
        assert all(torch.equal(given[name], value) for name, value in expected.items())
        ends = [
            GenerationConfig.from_pretrained(f).eos_token_id
            if (f / "generation_config.json").is_file()
            else None
            for f in (whole.folder, tmp_path / "again")
        ]
        assert ends[0] == ends[1]

    def test_there_is_nothing_to_convert(self, whole: Whole) -> None:
        checkpoint, family, layout = open_checkpoint(whole.folder)
        assert layout == "transformers"
        with pytest.raises(UnsupportedCheckpointError, match="nothing to convert"):
            family.plan(checkpoint)

    def test_the_prompt_is_frozen(self, whole: Whole) -> None:
        if whole.name not in FROZEN:
            pytest.skip("its snapshot holds another conversation, see the family's own tests")
        processor = AutoProcessor.from_pretrained(whole.folder)
        assert prompt(processor) == FROZEN[whole.name]

    @torch.no_grad()
    def test_another_image_size_goes_with_the_same_words(self, whole: Whole, tmp_path: Path) -> None:
        size = OTHER_SIZES.get(whole.name, 2 * whole.plan.after.image_size)
        again = swapped_folder(whole.folder, whole.encoder, tmp_path / "again", size)
        assert (again.before, again.after.image_size) == (whole.plan.after, size)
        first, second = (AutoProcessor.from_pretrained(f) for f in (whole.folder, tmp_path / "again"))
        assert second.tokenizer(QUESTION).input_ids == first.tokenizer(QUESTION).input_ids
        assert second.chat_template == first.chat_template
        model, _ = load_mllm(tmp_path / "again", dtype=torch.float32)
        new = model.generate(**asked(second), do_sample=False, max_new_tokens=2, min_new_tokens=2)
        assert new.shape[1] >= 2

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @torch.no_grad()
    def test_half_precision_stays_half_precision(
        self, whole: Whole, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        source = in_dtype(whole.source, tmp_path / "half", dtype)
        plan = swapped_folder(source, whole.encoder, tmp_path / "swapped")
        assert {step.dtype for step in plan.steps} == {str(dtype).removeprefix("torch.")}
        model, processor = load_mllm(tmp_path / "swapped")
        found = {value.dtype for value in model.state_dict().values() if value.is_floating_point()}
        # transformers keeps some layers of this model and of T5 in float32, where float16 would overflow
        kept = {torch.float32} if dtype == torch.float16 and whole.name.startswith("instructblip") else set()
        assert found == {dtype} | kept
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in asked(processor).items()}
        if whole.name not in UNASKED and not kept:
            assert model(**given).logits.dtype == dtype

    def test_tied_embeddings_stay_tied(self, whole: Whole, tmp_path: Path) -> None:
        if whole.name in NEVER_TIED:
            pytest.skip("its language model has a head of its own")
        source = tied(whole.source, tmp_path / "tied")
        swapped_folder(source, whole.encoder, tmp_path / "swapped")
        model, _ = load_mllm(tmp_path / "swapped", dtype=torch.float32)
        rows = model.get_input_embeddings().weight
        assert model.get_output_embeddings().weight is rows
        expected = embedding(source)
        torch.testing.assert_close(rows[: len(expected)], expected.float(), atol=0, rtol=0)
        model.save_pretrained(tmp_path / "saved")
        again, _ = load_mllm(tmp_path / "saved", dtype=torch.float32)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert torch.equal(again.get_input_embeddings().weight, rows)

    def test_questions_are_answered_alike_alone_and_in_a_padded_batch(self, whole: Whole) -> None:
        if whole.name in UNASKED:
            pytest.skip(UNASKED[whole.name])
        scorer = Scorer(*load_mllm(whole.folder, dtype=torch.float32))
        items = [
            MCQItem(id=str(i), images=["x.png"], question="What is seen?" * (i + 1),
                    options=["drusen", "a cataract"], answer=0, category="x")
            for i in range(3)
        ]  # fmt: skip
        pictures = [[Image.new("RGB", (70, 50), color)] for color in ("red", "blue", "green")]
        together = scorer.score(items, pictures)
        for item, picture, score in zip(items, pictures, together, strict=True):
            (alone,) = scorer.score([item], [picture])
            assert score.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
            assert sum(score.probabilities) == pytest.approx(1)
