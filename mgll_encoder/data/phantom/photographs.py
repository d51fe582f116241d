"""A procedural fundus phantom: synthetic retina photographs, for demos and tests without downloads.

A finding changes the anatomy before rendering, paints lesions on it, or degrades the optics afterwards. Everything else
(pigmentation, laterality, vessels, field, noise) varies independently of the findings.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from mgll_encoder.common.errors import unknown_name
from mgll_encoder.data.phantom.canvas import Array, Canvas, Mask, Place, edge, planes, to_image
from mgll_encoder.data.phantom.findings import FINDINGS, Anatomy


def render(
    findings: Sequence[str],
    seed: int | Sequence[int],
    size: int = 64,
    severity: float = 0.5,
    left_eye: bool = False,
) -> Image.Image:
    """Render one fundus photograph.

    Args:
        findings: Names from :data:`FINDINGS`; empty for a healthy eye.
        seed: Seed, or sequence of seeds; the same picture for the same arguments.
        size: Side of the square picture in pixels.
        severity: 0 (just visible) to 1 (florid).
        left_eye: A left eye has its disc on the left of the picture.

    Returns:
        An RGB image, black outside the round field of view.

    Raises:
        UserError: a finding is not known.
    """
    for name in findings:
        if name not in FINDINGS:
            raise unknown_name("phantom disease", name, FINDINGS)
    shown = [FINDINGS[name] for name in findings]
    # three random streams, so that a finding changes nothing but its own effect
    eye_rng, finding_rng, camera_rng = np.random.default_rng(seed).spawn(3)
    canvas = Canvas(max(2 * size, 128), eye_rng)
    eye = _draw_eye_parameters(eye_rng, left_eye)
    for finding in shown:
        if finding.anatomy:
            finding.anatomy(eye, severity)
    _paint_retina(canvas, eye)
    _paint_disc(canvas, eye)
    _paint_vessels(canvas, eye)
    canvas.rng = finding_rng
    for finding in shown:
        if finding.lesions:
            finding.lesions(canvas, eye, severity)
    for finding in shown:
        if finding.optics:
            finding.optics(canvas, severity)
    return _photograph(canvas, size, camera_rng)


def _draw_eye_parameters(rng: np.random.Generator, left_eye: bool) -> Anatomy:
    temporal = 1 if left_eye else -1
    center = rng.uniform(-0.08, 0.08, 2)
    apart, tilt = rng.uniform(0.50, 0.60), rng.uniform(-0.02, 0.12)
    fovea = (float(center[0] + temporal * (0.08 + apart * 0.25)), float(center[1]))
    red, pigment = rng.uniform(0.66, 0.86), rng.uniform(0.40, 0.52)
    return Anatomy(
        temporal=temporal,
        fovea=fovea,
        disc=(float(fovea[0] - temporal * apart), float(fovea[1] - tilt)),
        disc_ratio=float(rng.uniform(0.84, 0.94)),
        disc_radius=float(rng.uniform(0.165, 0.195)),
        background=(red, red * pigment, red * pigment * rng.uniform(0.38, 0.55)),
        cup_ratio=float(rng.uniform(0.25, 0.45)),
        choroid=float(rng.uniform(0.0, 0.12)),
    )


def _paint_retina(canvas: Canvas, eye: Anatomy) -> None:
    canvas.rgb = planes(eye.background) * (1 + 0.035 * canvas.noise(6) + 0.015 * canvas.noise(32))
    # choroidal vessels: bright ridges of smooth noise between dark islands
    ridges = np.exp(-((np.abs(canvas.noise(19) + 0.6 * canvas.noise(27)) / 0.42) ** 2))
    macula = canvas.distance(eye.fovea)
    strength = eye.choroid * (1 - 0.55 * np.exp(-((macula / 0.25) ** 2)))
    canvas.rgb *= 1 - strength * (1 - ridges) * planes((0.42, 0.58, 0.55))
    canvas.rgb += strength * ridges * planes((0.10, 0.11, 0.05))
    canvas.rgb *= 1 - _periphery(canvas.size) * (1 - planes(eye.periphery))
    canvas.blend(0.42 * np.exp(-((macula / 0.15) ** 2)), (0.42, 0.14, 0.07))
    canvas.blend(0.35 * np.exp(-((macula / 0.018) ** 2)), (0.95, 0.75, 0.55))


@lru_cache(maxsize=4)
def _periphery(size: int) -> Array:
    """Return how peripheral each pixel is, 0 to 1."""
    radius = Canvas(size, np.random.default_rng(0)).distance((0.0, 0.0))
    weight: Array = np.clip((radius - 0.35) / 0.65, 0, 1) ** 1.5
    return weight


def _paint_disc(canvas: Canvas, eye: Anatomy) -> None:
    if eye.crescent:
        adjacent = (eye.disc[0] + eye.temporal * eye.disc_radius * eye.crescent * 0.5, eye.disc[1])
        atrophy = canvas.distance(adjacent, 0.85) / (eye.disc_radius * (1 + 0.35 * eye.crescent))
        canvas.blend(0.85 * edge(atrophy, 0.05), (0.98, 0.88, 0.70))
    distance = canvas.distance(eye.disc, eye.disc_ratio) / eye.disc_radius
    canvas.blend(0.30 * np.exp(-((distance / 1.6) ** 2)), (0.98, 0.66, 0.36))
    waxy = [a + eye.pallor * (b - a) for a, b in zip((0.96, 0.62, 0.36), (0.95, 0.82, 0.60), strict=True)]
    canvas.blend(0.92 * edge(distance, 0.05), (waxy[0], waxy[1], waxy[2]))
    cup = canvas.distance((eye.disc[0] + eye.temporal * 0.012, eye.disc[1]), eye.disc_ratio) / eye.disc_radius
    canvas.blend(0.95 * edge(cup / eye.cup_ratio, 0.09), (1.0, 0.96, 0.80))


def _paint_vessels(canvas: Canvas, eye: Anatomy) -> None:
    rng = canvas.rng
    arteries, veins = canvas.mask(blur=0.005), canvas.mask(blur=0.005)
    t = np.linspace(0, 1.05, 14)
    for vertical in (-1, 1):
        for mask, caliber in ((arteries, 0.020), (veins, 0.029)):
            reach, flank = rng.uniform(0.38, 0.52), rng.uniform(0.3, 0.6)
            temporal = np.stack(
                [1.15 * t**1.9 - 0.05 * np.sin(np.pi * t), vertical * reach * np.sin(1.9 * t)], 1
            )
            nasal = np.stack([-0.75 * t**1.2, vertical * (0.12 + flank * t) * t**0.5], 1)
            for path in (temporal, nasal):
                wobble = np.cumsum(rng.normal(0, 0.007, path.shape), axis=0)
                points = (path + wobble) * (eye.temporal, 1) + eye.disc
                _branch(mask, points.tolist(), caliber * eye.vessel, rng, generation=0)
    canvas.rgb *= 1 - arteries.read() * planes((0.14, 0.40, 0.36))
    canvas.rgb *= 1 - veins.read() * planes((0.34, 0.60, 0.50))


_TWIGS = (3, 2)
"""Side branches of a vessel, by generation; the last one has none."""


def _branch(
    mask: Mask, points: Sequence[Place], caliber: float, rng: np.random.Generator, generation: int
) -> None:
    """Draw a vessel that tapers over two pieces, and its side branches."""
    middle = len(points) // 2
    mask.line(points[: middle + 1], caliber, level=1.0 - 0.15 * generation)
    mask.line(points[middle:], 0.65 * caliber, level=0.9 - 0.2 * generation)
    if generation == len(_TWIGS):
        return
    for start in rng.choice(len(points) - 3, size=_TWIGS[generation], replace=False).tolist():
        (x0, y0), (x, y) = points[start + 1 : start + 3]
        angle = math.atan2(y - y0, x - x0) + (-1, 1)[rng.integers(2)] * rng.uniform(0.4, 0.9)
        bends = rng.normal(0, 0.16, 6).tolist()
        step = rng.uniform(0.04, 0.065) / (1 + 0.4 * generation)
        twig = [(x, y)]
        for bend in bends:
            angle += bend
            x, y = x + step * math.cos(angle), y + step * math.sin(angle)
            twig.append((x, y))
        _branch(mask, twig, 0.55 * caliber, rng, generation + 1)


def _photograph(canvas: Canvas, size: int, rng: np.random.Generator) -> Image.Image:
    radius = canvas.distance((0.0, 0.0))
    flare = rng.uniform(-0.35, 0.35, 2)
    light = rng.uniform(0.86, 1.08) * (1.06 - 0.22 * canvas.squared_distance((flare[0], flare[1])))
    aperture = edge(radius / rng.uniform(0.955, 1.0), 0.006)
    balance = rng.normal(1, 0.035, (3, 1, 1)).astype(np.float32)
    picture = to_image(canvas.rgb * balance * (light * aperture))
    picture = picture.resize((size, size), Image.Resampling.BOX)
    grain = rng.normal(0, rng.uniform(1.0, 3.5), (size, size, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
