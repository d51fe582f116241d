"""Checks of a model before a run: its prompt, its tower, its training images, and whether it uses the image."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eval_mcq.backends.choice import backend_here
from eval_mcq.backends.fingerprint import model_fingerprint
from eval_mcq.items.schema import Bench, MCQItem
from eval_mcq.records.leaks import Leak, find_leak, trainings_of_model
from mgll_encoder.common.devices import Precision
from mgll_encoder.common.hub import at_hand
from mgll_encoder.common.trained_on import Training

if TYPE_CHECKING:
    from eval_mcq.runs.image_sensitivity import ImageSensitivity

EXAMPLE = MCQItem(
    id="example", images=["x"], question="Which finding does this fundus photograph show?",
    options=["glaucoma", "cataract"], answer=0, category="x",
)  # fmt: skip
"""Question whose prompt is shown if there is no benchmark."""


@dataclass(frozen=True)
class SwappedTower:
    """The tower recorded at a swap.

    Attributes:
        name: The tower; None for the model's own, as after a conversion.
        source: The model whose tower was replaced.
        passed: Whether the model's tower is this one; None if this could not be checked.
        detail: What was compared.
    """

    name: str | None
    source: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class ModelCheck:
    """The result of `check_model`.

    Attributes:
        fingerprint: Hash of the model's files.
        prompt: The full prompt of a question.
        tower: The tower recorded at a swap; None for a model without such a record.
        trainings: The recorded trainings of the model.
        leak: Images of the benchmark that it was trained on.
        sensitivity: Accuracy with real, blank and exchanged images; None without a benchmark.
        faults: Why the model is unusable, one sentence each: it has a different tower, or the image has no effect.
    """

    fingerprint: str
    prompt: str
    tower: SwappedTower | None
    trainings: tuple[Training, ...]
    leak: Leak | None
    sensitivity: "ImageSensitivity | None"
    faults: tuple[str, ...]


def check_model(
    model: str | Path,
    bench: Bench | None = None,
    *,
    limit: int = 100,
    device: str = "auto",
    precision: Precision = "auto",
    load_in_4bit: bool = False,
) -> ModelCheck:
    """Check a model: prompt, provenance and, with a benchmark, whether its answers depend on the image.

    Args:
        model: Model folder.
        bench: Benchmark of `eval_mcq.load_benchmark`.
        limit: Maximum number of questions, evenly spaced, each asked with its image, a blank one and that of
            another question.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto`` uses the GPU if there is one.
        precision: ``auto`` is bfloat16 on a GPU and float32 elsewhere.
        load_in_4bit: NF4 weights (bitsandbytes).

    Raises:
        UserError: the model cannot be read, or an image of the benchmark is missing.
    """
    from mllm_adapters import is_swapped

    folder = at_hand(model)
    backend = backend_here(model, device=device, precision=precision, load_in_4bit=load_in_4bit)
    fingerprint = model_fingerprint(folder)
    from eval_mcq.runs.image_sensitivity import contradictions, image_sensitivity
    from mllm_adapters import Verification  # imports torch, which is not needed to report a wrong path

    swap = Verification(folder) if is_swapped(folder) else None
    scorer = backend.load()
    tower, faults = None, []
    if swap:
        plan, found = swap.record.plan, swap.tower()
        tower = SwappedTower(plan["tower"], plan["source"], found.passed, found.detail)
        faults = contradictions(scorer.model, scorer.processor, plan["after"])
        if tower.passed is False:
            faults.append(f"the tower differs from its provenance: {tower.detail}")
    sensitivity = image_sensitivity(scorer, bench, limit) if bench else None
    if sensitivity and not sensitivity.sensitive:
        faults += sensitivity.warnings[:1]
    return ModelCheck(
        fingerprint=fingerprint,
        prompt=scorer.prompt(bench.items[0] if bench else EXAMPLE),
        tower=tower,
        trainings=trainings_of_model(folder),
        leak=find_leak(folder, bench) if bench else None,
        sensitivity=sensitivity,
        faults=tuple(faults),
    )
