"""Alignment in closed form: fits the connector on unlabeled images, to reproduce its outputs on the old tower.

Both towers encode the same images. For every linear layer that reads vision features, ridge regression finds
the layer whose pre-activations on the new features match those of the old layer on the old features
(`mllm_adapters.alignment.ridge`).
Normalisations before a connector stay as planned: the regression uses their outputs, so it is exact for both
together. Nothing is trained, and no language model is loaded.

Tokens are matched by position. If the grids or the fields of view differ, old features are interpolated
bilinearly between patch centers; positions outside the old tower's field of view (center crop) are ignored.
The class token is matched with the class token.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mgll_encoder.common.devices import find_device
from mgll_encoder.common.errors import InvalidArgumentError, UnsupportedCheckpointError, UserError
from mgll_encoder.common.images import open_image
from mgll_encoder.common.picture_bytes import picture_digests
from mgll_encoder.common.progress import counting
from mgll_encoder.common.skipped import UNREADABLE, Skipped, unnamed
from mgll_encoder.common.trained_on import Training
from mllm_adapters.alignment.feature_pairs import FEWEST, FeaturePairs, find_images
from mllm_adapters.alignment.ridge import Fit, Linear, Moments, fit_connectors
from mllm_adapters.alignment.vision_model import VisionModel, planned_vision_model, source_vision_model
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import ConnectorLayer, Family, Plan
from mllm_adapters.core.fates import Fitted
from mllm_adapters.core.operations import REINIT, Step

SAMPLES = 500
"""Default number of images."""

BATCH = 8
"""Images per batch."""

HELD_OUT = 5
"""One in this many images is held out."""

POOR = 0.5
"""Held-out R² below which the fit has failed; see the measurements in docs/alignment.md."""

SCARCE = 5
"""Tokens per feature below which more images would help."""

FEATURES = 1e-6
"""Ridge of the layer that writes into the new features' space (`Reading.adds`), relative to its mean square."""


@dataclass(frozen=True)
class ConnectorFit:
    """The fit of a connector layer.

    Attributes:
        connector: Its name in the checkpoint.
        r2: Share of the variance of its pre-activations on held-out images that the fit explains.
        relative_error: Root mean square error there, relative to the root mean square of the pre-activations.
        r2_unaligned: The same share for the layer after a plain swap; None if that would re-initialize it.
        strength: Ridge strength, relative to the mean variance of the features.
        towards: What the ridge shrinks towards: ``zero``, or ``kept``, the layer after a plain swap.
        intercept: Whether an intercept was fitted; a layer without bias has none.
        seconds: Time to solve for it and the layers with the same input.
    """

    connector: str
    r2: float
    relative_error: float
    r2_unaligned: float | None
    strength: float
    towards: str
    intercept: bool
    seconds: float


@dataclass(frozen=True)
class Alignment:
    """The fitted connector layers.

    Attributes:
        tensors: Their values, float32, by names in the checkpoint.
        fits: The fit of each layer.
        images: Folder or manifest of the images.
        used: Number of images used.
        held_out: Number of these that chose the ridge strength.
        tokens: Number of tokens in the fit.
        unreadable: Number of images that were left out.
        skipped: Description of the reasons.
        seconds: Total time.
        device: Device of the towers.
        digests: Hashes of the images (`picture_digest`).
    """

    tensors: Mapping[str, Tensor]
    fits: tuple[ConnectorFit, ...]
    images: Path
    used: int
    held_out: int
    tokens: int
    unreadable: int
    skipped: tuple[str, ...]
    seconds: float
    device: str
    digests: tuple[str, ...] = ()

    def training(self) -> Training:
        """Return the record of the images used for the fit."""
        return Training.of(("projector",), "swap-encoder --align", self.digests)

    def record(self) -> dict[str, Any]:
        """Return the record for ``mgll_swap.json``, without values, and without paths, which may name patients."""
        kept = ("used", "unreadable", "held_out", "tokens", "seconds", "device")
        fields = {name: getattr(self, name) for name in kept}
        return {
            "images": self.images.absolute().name,
            **fields,
            "connectors": [asdict(fit) for fit in self.fits],
        }

    def apply_to(self, plan: Plan) -> Plan:
        """Return the plan with the fates of its connector layers, for provenance and model card."""
        fates = {fit.connector: Fitted(images=self.used, r2=fit.r2) for fit in self.fits}
        connectors = {**plan.connectors, **fates}
        return plan.model_copy(update={"connectors": connectors, "alignment": self.record()})

    def warnings(self) -> list[str]:
        """Return warnings for the user."""
        found = list(self.skipped)
        for fit in self.fits:
            if fit.r2 < POOR:
                found.append(
                    f"alignment did not work for {fit.connector}: on held-out images it explains {fit.r2:.0%} of what "
                    f"the old tower's features gave; add images (`samples`, now {self.used}) of the kind "
                    "that the model will be used on, and retrain the projector before use"
                )
        widest = max(value.shape[-1] for value in self.tensors.values() if value.ndim == 2)
        if self.tokens < SCARCE * widest:
            found.append(
                f"{self.used} images gave {self.tokens} tokens for features {widest} wide: more images "
                "would improve the fit"
            )
        return found


def fitted_plan(plan: Plan, family: Family, checkpoint: Checkpoint) -> Plan:
    """Return a swap's plan with its connector to be fitted on images.

    Raises:
        UserError: it is not a swap, or has no linear layer that reads features.
    """
    if not plan.swapped:
        raise InvalidArgumentError("`images` goes with a new tower: give one with `encoder`")
    plan = family.for_alignment(plan, checkpoint)
    connector_layers = family.connector_layers(plan)
    if not connector_layers:
        raise UnsupportedCheckpointError(
            f"{plan.source}: no linear layer of its own reads the tower's features ({', '.join(plan.connectors)}), so "
            "there is nothing to align: leave out `images` and retrain the projector"
        )
    linears = {name for reading in connector_layers for name in (reading.linear, reading.adds) if name}
    steps = [_to_fit(step) if step.name.rpartition(".")[0] in linears else step for step in plan.steps]
    fates = {name: Fitted() if name in linears else fate for name, fate in plan.connectors.items()}
    return plan.model_copy(update={"steps": tuple(steps), "connectors": fates})


def _to_fit(step: Step) -> Step:
    replaces = step.replaces or next(iter(step.sources), None)
    return step.model_copy(update={"operation": "fit", "sources": (), "replaces": replaces, "arguments": {}})


@torch.no_grad()
def align(
    plan: Plan,
    family: Family,
    checkpoint: Checkpoint,
    images: Path,
    *,
    samples: int = SAMPLES,
    device: str = "auto",
) -> Alignment:
    """Fit the connector of a swap on images.

    Args:
        plan: The swap's plan without alignment.
        family: The family that made it.
        checkpoint: Its source.
        images: Folder of images, searched recursively, or an MGLL manifest.
        samples: Maximum number of images, sampled with a fixed seed.
        device: Device of the towers: ``auto``, or a torch device.

    Raises:
        UserError: there are too few images, the old tower cannot be found, or there is no such device.
    """
    began, place = time.monotonic(), find_device(device)
    target = fitted_plan(plan, family, checkpoint)
    files, connector_layers = find_images(images, samples), family.connector_layers(target)
    try:
        old = source_vision_model(target, family, checkpoint, place)
    except UserError as error:
        raise InvalidArgumentError(f"`images` needs the model as it was, tower and all: {error}") from error
    new = planned_vision_model(target, family, checkpoint, place)
    points = {_point(r): (_point(r), r.at or r.host or r.linear) for r in connector_layers}
    data = _Data(FeaturePairs(family, old, new, points))
    with counting("Encoding images", len(files)) as advance:
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            data.add(batch)
            advance(len(batch))
    if data.used < FEWEST:
        found = "; ".join(data.skipped.lines())
        raise InvalidArgumentError(
            f"`images={images}`: {data.used} readable images are too few, {FEWEST} at least are needed; {found}"
        )
    tensors, fits = _solve(data, connector_layers, old, plan, target)
    return Alignment(
        tensors=tensors,
        fits=tuple(fits),
        images=images,
        used=data.used,
        held_out=len(range(HELD_OUT - 1, data.used, HELD_OUT)),
        tokens=max(one.tokens for one in data.fitted.values()),
        unreadable=data.skipped.total,
        skipped=tuple(data.skipped.lines()),
        seconds=round(time.monotonic() - began, 1),
        device=str(place),
        digests=tuple(picture_digests(files, "Hashing images").values()),
    )


def _point(reading: ConnectorLayer) -> str:
    return reading.at or reading.linear


class _Data:
    """Moments of two towers' features, for fitting and for choosing the ridge strength.

    Args:
        watch: Runs the models on images.
    """

    def __init__(self, watch: FeaturePairs) -> None:
        self._watch = watch
        self.fitted: dict[str, Moments] = {}
        self.held_out: dict[str, Moments] = {}
        self.skipped = Skipped(unit="images")
        self.used = 0

    def add(self, files: Sequence[Path]) -> None:
        """Add a batch of images; those that cannot be opened are left out and counted."""
        pictures: list[Image.Image] = []
        for file in files:
            self.skipped.read += 1
            try:
                pictures.append(open_image(file))
            except UserError as error:
                self.skipped.add(
                    UNREADABLE, f"image {self.skipped.read} of the sample {unnamed(error, file)}"
                )
        if not pictures:
            return
        numbers = torch.arange(self.used, self.used + len(pictures))
        held = numbers % HELD_OUT == HELD_OUT - 1
        for point, pairs in self._watch.look(pictures).items():
            for moments, chosen in ((self.fitted, ~held), (self.held_out, held)):
                new, old = pairs.rows(chosen)
                if point not in moments:
                    # Apple's accelerator has no float64.
                    device = new.device if new.device.type != "mps" else torch.device("cpu")
                    moments[point] = Moments(new.shape[-1], old.shape[-1], device)
                moments[point].add(new, old)
        self.used += len(pictures)


def _solve(
    data: _Data, connector_layers: Sequence[ConnectorLayer], old: VisionModel, plan: Plan, target: Plan
) -> tuple[dict[str, Tensor], list[ConnectorFit]]:
    """Return the values of the fitted tensors, and the quality of the fits."""
    biased = {step.name.removesuffix(".bias") for step in target.steps if step.name.endswith(".bias")}
    reinitialized = {step.name.removesuffix(".weight") for step in plan.steps if step.kind is REINIT}
    tensors: dict[str, Tensor] = {}
    fits: dict[str, ConnectorFit] = {}
    for point in data.fitted:
        began, group = time.monotonic(), [r for r in connector_layers if _point(r) == point]
        fitted, held_out = data.fitted[point], data.held_out[point]
        targets = [_target(old, r, fitted.old, bias=r.linear in biased) for r in group]
        stays = fitted.new == fitted.old
        starts = [
            one if stays and r.linear not in reinitialized else None
            for r, one in zip(group, targets, strict=True)
        ]
        found = fit_connectors(fitted, held_out, targets, starts)
        seconds = round(time.monotonic() - began, 2)
        for reading, one in zip(group, found, strict=True):
            fits[reading.linear] = _described(reading.linear, one, seconds)
            tensors |= _tensors(reading.linear, one.layer)
            if reading.adds:
                tensors |= _tensors(reading.adds, _writer(old, reading, one.layer))
    return tensors, [fits[reading.linear] for reading in connector_layers]


def _target(old: VisionModel, reading: ConnectorLayer, width: int, *, bias: bool) -> Linear:
    """Return the old model's layer at a connector layer, or the identity."""
    module = old.module(reading.host or reading.linear)
    if isinstance(module, nn.Linear):
        given = module.bias if module.bias is not None else module.weight.new_zeros(module.out_features)
        return Linear(module.weight, given if bias else None)
    return Linear(torch.eye(width), torch.zeros(width) if bias else None)


def _described(connector: str, fit: Fit, seconds: float) -> ConnectorFit:
    return ConnectorFit(
        connector=connector,
        r2=round(fit.r2, 4),
        relative_error=round(fit.error, 4),
        r2_unaligned=None if fit.r2_start is None else round(fit.r2_start, 4),
        strength=fit.strength,
        towards="kept" if fit.shrunk_to_start else "zero",
        intercept=fit.layer.bias is not None,
        seconds=seconds,
    )


def _tensors(name: str, layer: Linear) -> dict[str, Tensor]:
    values = {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    return {key: value.float().cpu() for key, value in values.items() if value is not None}


def _writer(old: VisionModel, reading: ConnectorLayer, layer: Linear) -> Linear:
    """Adapt the layer that adds to the features, so that its effect on the fitted connector layer is unchanged.

    Least squares again: V' of W' V' = W V, with a small ridge if W' has fewer columns than W.
    """
    reader, writer = old.module(reading.linear), old.module(str(reading.adds))
    assert isinstance(reader, nn.Linear)
    assert isinstance(writer, nn.Linear)
    new = layer.weight
    square = new.T @ new
    ridge = (
        FEATURES * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
    )
    back = torch.linalg.solve(square + ridge, new.T) @ reader.weight.to(new)
    return Linear(back @ writer.weight.to(new), back @ writer.bias.to(new))
