"""Checks for a broken swap: do the answers depend on the image, and does the model answer with letters?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval_mcq.items.schema import Bench, MCQItem
from eval_mcq.scoring.prompt import Ask
from eval_mcq.tables import intervals
from eval_mcq.tables.intervals import Estimate
from eval_mcq.tables.notes import LOW_MASS
from mgll_encoder.common.images import open_image
from mgll_encoder.common.progress import counting

if TYPE_CHECKING:
    from eval_mcq.scoring.answerer import Answerer
    from eval_mcq.scoring.modes import Score

QUICK = 8
"""Questions that are checked before a run starts."""

UNMOVED = 1e-4
"""If no probability changes by more than this when the image is exchanged, the model ignores the image."""


Pictures = list[Image.Image]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class ImageSensitivity:
    """A model's answers with real, blank, and exchanged images.

    Attributes:
        questions: Number of questions.
        average: Macro average of the accuracy over diseases, with real, blank and shuffled images.
        drop: Its loss with blank and with shuffled images; None with too few patients.
        moved: Maximum change of a probability with blank and with shuffled images.
        mass: Mean probability of the letters; None if the scoring mode has none.
        prior: Probability of each letter for a blank image and a question without content.
    """

    questions: int
    average: dict[str, Estimate]
    drop: dict[str, Estimate | None]
    moved: dict[str, float]
    mass: float | None
    prior: list[float]

    @property
    def sensitive(self) -> bool:
        """Whether the answers depend on the image."""
        return max(self.moved.values()) > UNMOVED

    @property
    def warnings(self) -> list[str]:
        """The problems found, one sentence each."""
        found = []
        if not self.sensitive:
            found.append(
                f"the answers do not depend on the image: blank and exchanged images change no probability by more "
                f"than {UNMOVED:g} in {self.questions} questions; tower, projector or image tokens are broken"
            )
        if self.mass is not None and self.mass < LOW_MASS:
            found.append(
                f"the model rarely answers with letters: their total probability is {self.mass:.2f} in "
                f"{self.questions} questions; consider `mode=options`"
            )
        return found


def image_sensitivity(scorer: "Answerer[Any]", bench: Bench, questions: int) -> ImageSensitivity:
    """Score some questions of a benchmark, evenly spaced, with real, blank and exchanged images."""
    items = _some(bench, questions)
    # Opened a second time when they are scored: which batch has them is not known here, and few are looked at.
    real = [[open_image(path) for path in bench.image_paths(item)] for item in items]
    blank = [[_blank(image) for image in images] for images in real]
    kinds = {"real": real, "blank": blank, "shuffled": _exchanged(items, real)}
    scores: dict[str, list[Score]] = {kind: [] for kind in kinds}
    with counting("Trying questions with real, blank and exchanged images", len(items)) as advance:
        for start in range(0, len(items), QUICK):
            some = slice(start, start + QUICK)
            for kind, images in kinds.items():
                scores[kind] += scorer.score(items[some], images[some])
            advance(len(items[some]))
    right = {
        kind: np.array([score.choice == item.answer for item, score in zip(items, of_kind, strict=True)])
        for kind, of_kind in scores.items()
    }
    masses = [score.letter_mass for score in scores["real"] if score.letter_mass is not None]
    return ImageSensitivity(
        questions=len(items),
        average={kind: _average(items, right[kind]) for kind in kinds},
        drop={kind: _drop(items, right[kind], right["real"]) for kind in ("blank", "shuffled")},
        moved={kind: _moved(scores["real"], scores[kind]) for kind in ("blank", "shuffled")},
        mass=sum(masses) / len(masses) if masses else None,
        prior=_prior(scorer, max(len(item.options) for item in items), blank[0][0]),
    )


def _average(items: Sequence[MCQItem], right: Bools) -> Estimate:
    masks, patients = _groups(items)
    parts = [intervals.share(right[mask], patients[mask]) for mask in masks]
    values = right.astype(float)
    return intervals.mean(parts, [values[mask] for mask in masks], [patients[mask] for mask in masks])


def _drop(items: Sequence[MCQItem], without: Bools, real: Bools) -> Estimate | None:
    masks, patients = _groups(items)
    if len(np.unique(patients)) < intervals.FEWEST:
        return None
    parts = [intervals.gain(without[mask], real[mask], patients[mask]) for mask in masks]
    values = real.astype(float) - without
    return intervals.mean(parts, [values[mask] for mask in masks], [patients[mask] for mask in masks])


def _groups(items: Sequence[MCQItem]) -> tuple[list[Bools], intervals.Ids]:
    """Return the questions of each disease as masks, and the patient of each question."""
    places = np.array([item.category for item in items])
    _, patients = np.unique([item.cluster for item in items], return_inverse=True)
    return [places == category for category in dict.fromkeys(places.tolist())], patients


def contradictions(model: Any, processor: Any, after: Mapping[str, Any]) -> list[str]:
    """Compare the loaded model with its provenance: the tower's geometry, and the preprocessing of pixels.

    Args:
        model: The model.
        processor: Its processor.
        after: The vision specification after the swap, as recorded.
    """
    towers = {(c.image_size, c.patch_size, c.hidden_size) for c in _vision_configs(model)}
    expected = (after["image_size"], after["patch_size"], after["width"])
    found = []
    if towers and expected not in towers:
        found.append(f"image size, patch size and width of the tower are {min(towers)}, not {expected}")
    images = getattr(processor, "image_processor", None)
    for field in ("mean", "std"):
        value = getattr(images, f"image_{field}", None)
        if value is not None and [round(v, 4) for v in value] != [round(v, 4) for v in after[field]]:
            found.append(f"pixels are normalized with {field} {list(value)}, not {after[field]}")
    return found


def _vision_configs(model: Any) -> list[Any]:
    fields = ("image_size", "patch_size", "hidden_size")
    parts = [module.config for module in model.modules() if getattr(module, "config", None) is not None]
    return [
        config for config in parts if all(isinstance(getattr(config, field, None), int) for field in fields)
    ]


def _some(bench: Bench, count: int) -> list[MCQItem]:
    """Select evenly spaced questions, on different images if possible."""
    by_image = {tuple(item.images): item for item in reversed(bench.items)}
    different = list(by_image.values())[::-1]
    pool = different if len(different) >= min(count, 2) else bench.items
    step = max(len(pool) / count, 1)
    return [pool[int(i * step)] for i in range(min(count, len(pool)))]


def _exchanged(items: Sequence[MCQItem], images: Sequence[Pictures]) -> list[Pictures]:
    """Return each question's images replaced by those of another patient, if there is one with as many.

    The search starts half a benchmark away: neighbors are often the fellow eye, with the same disease.
    """
    exchanged = []
    for i, item in enumerate(items):
        start = i + len(items) // 2
        others = [place % len(items) for place in range(start, start + len(items))]
        fitting = [j for j in others if items[j].images != item.images and len(images[j]) == len(item.images)]
        strangers = (j for j in fitting if items[j].cluster != item.cluster)
        exchanged.append(images[next(strangers, fitting[0] if fitting else i)])
    return exchanged


def _blank(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size, (127, 127, 127))


def _moved(real: Sequence["Score"], other: Sequence["Score"]) -> float:
    return max(
        abs(a - b)
        for of_real, of_other in zip(real, other, strict=True)
        for a, b in zip(of_real.probabilities, of_other.probabilities, strict=True)
    )


def _prior(scorer: "Answerer[Any]", options: int, blank: Image.Image) -> list[float]:
    """Compute the letter prior with a prompt without content (contextual calibration, Zhao et al. 2021)."""
    empty = MCQItem.model_construct(
        id="prior", images=["blank"], question="N/A", options=["N/A"] * options, answer=0, category="", source="",
        patient="", tags=[],
    )  # fmt: skip
    prepared = scorer.prepare([Ask(empty)], [blank])
    return scorer.answer([prepared])[0][0].probabilities
