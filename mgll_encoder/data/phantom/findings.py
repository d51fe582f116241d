"""How each disease of the phantom changes the picture."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from mgll_encoder.data.phantom.canvas import Canvas, Color, edge

DRUSEN: Color = (0.98, 0.86, 0.45)
EXUDATE: Color = (1.0, 0.95, 0.55)
COTTON: Color = (0.97, 0.93, 0.82)
BLOOD: Color = (0.36, 0.03, 0.03)
PIGMENT: Color = (0.10, 0.05, 0.04)


@dataclass
class Anatomy:
    """The anatomy without lesions; lengths in units of the field's radius.

    Attributes:
        temporal: +1 where the temple is to the right of the picture (left eye), -1 for a right eye.
        disc: Center of the optic disc.
        fovea: Center of the macula.
        disc_radius: Vertical radius of the disc.
        disc_ratio: Horizontal over vertical radius of the disc.
        cup_ratio: Cup over disc, vertical.
        crescent: Extent of the atrophy next to the disc, in disc radii.
        pallor: How waxy the neuroretinal rim is, 0 to 1.
        background: Color of the retina.
        choroid: Contrast of the choroidal vessels, 0 to 1.
        vessel: Scale of the vessel caliber.
        periphery: Color multiplier of the peripheral retina.
    """

    temporal: int
    disc: tuple[float, float]
    fovea: tuple[float, float]
    disc_radius: float
    disc_ratio: float
    background: Color
    cup_ratio: float
    choroid: float
    crescent: float = 0.0
    pallor: float = 0.0
    vessel: float = 1.0
    periphery: Color = (0.75, 0.68, 0.68)


@dataclass(frozen=True)
class Finding:
    """How a disease changes the image: each hook gets the severity, 0 (just visible) to 1 (florid)."""

    anatomy: Callable[[Anatomy, float], None] | None = None
    lesions: Callable[[Canvas, Anatomy, float], None] | None = None
    optics: Callable[[Canvas, float], None] | None = None


def _drusen(canvas: Canvas, eye: Anatomy, severity: float) -> None:
    soft, clumps = canvas.mask(blur=0.010), canvas.mask(blur=0.014)
    for place in canvas.scatter(int(22 + 40 * severity), eye.fovea, 0.0, 0.40, eye.disc):
        soft.spot(
            place, canvas.rng.uniform(0.016, 0.034 + 0.016 * severity), level=canvas.rng.uniform(0.6, 0.95)
        )
    canvas.blend(0.9 * soft.read(), DRUSEN)
    for place in canvas.scatter(int(3 + 6 * severity), eye.fovea, 0.0, 0.16):
        clumps.spot(place, canvas.rng.uniform(0.02, 0.045), canvas.rng.uniform(0.6, 1.5), level=0.8)
    canvas.blend(0.8 * clumps.read(), PIGMENT)


def _blister(canvas: Canvas, eye: Anatomy, severity: float) -> None:
    radius = 0.22 + 0.10 * severity
    center = (eye.fovea[0] + canvas.rng.uniform(-0.05, 0.05), eye.fovea[1] + canvas.rng.uniform(-0.05, 0.05))
    distance = canvas.distance(center, canvas.rng.uniform(0.85, 1.2)) / radius + 0.04 * canvas.noise(7)
    canvas.blend(0.55 * np.exp(-(((distance - 1.22) / 0.17) ** 2)), BLOOD)
    canvas.blend(0.45 * edge(distance, 0.06), (0.80, 0.60, 0.46))
    reflex = 0.55 + 0.25 * np.tanh(canvas.noise(5))
    canvas.blend(reflex * np.exp(-(((distance - 1.0) / 0.085) ** 2)), (0.99, 0.84, 0.60))
    canvas.blend(0.4 * np.exp(-((distance / 0.35) ** 2)), (0.90, 0.66, 0.22))


def _diabetic(canvas: Canvas, eye: Anatomy, severity: float) -> None:
    rng, center = canvas.rng, (eye.fovea[0] * 0.5, eye.fovea[1] * 0.5)
    dots, blots = canvas.mask(), canvas.mask(blur=0.006)
    for place in canvas.scatter(int(25 + 35 * severity), center, 0.05, 0.85, eye.disc):
        dots.spot(place, rng.uniform(0.008, 0.018))
    for place in canvas.scatter(int(9 + 16 * severity), center, 0.2, 0.85, eye.disc):
        for _ in range(3):
            shift = rng.normal(0, 0.018, 2)
            blots.spot(
                (place[0] + shift[0], place[1] + shift[1]), rng.uniform(0.018, 0.038), rng.uniform(0.6, 1.6)
            )
    canvas.blend(0.9 * dots.read(), BLOOD)
    canvas.blend(0.85 * blots.read(), BLOOD)
    hard, soft = canvas.mask(), canvas.mask(blur=0.016)
    for cluster in canvas.scatter(int(3 + 4 * severity), center, 0.30, 0.75, eye.disc):
        for place in canvas.scatter(7, cluster, 0.0, 0.08, eye.disc):
            hard.spot(place, rng.uniform(0.008, 0.017))
    for place in canvas.scatter(int(1 + 4 * severity), center, 0.35, 0.7, eye.disc):
        soft.spot(place, rng.uniform(0.03, 0.05), rng.uniform(0.8, 1.4), 0.85)
    canvas.blend(0.95 * hard.read(), EXUDATE)
    canvas.blend(soft.read(), COTTON)


def _macular_edema(canvas: Canvas, eye: Anatomy, severity: float) -> None:
    rng, radius = canvas.rng, 0.17 + 0.07 * severity
    swollen = canvas.distance(eye.fovea) / radius
    canvas.blend(0.45 * np.exp(-(swollen**4)), (0.72, 0.50, 0.36))
    hard, dots = canvas.mask(), canvas.mask()
    for _ in range(int(55 + 45 * severity)):
        angle, distance = rng.uniform(0, 2 * np.pi), radius * rng.normal(1.0, 0.11)
        hard.spot(
            (eye.fovea[0] + distance * np.cos(angle), eye.fovea[1] + distance * np.sin(angle)),
            rng.uniform(0.010, 0.021),
        )
    for place in canvas.scatter(8, eye.fovea, 0.0, 0.4, eye.disc):
        dots.spot(place, rng.uniform(0.008, 0.014))
    canvas.blend(0.8 * dots.read(), BLOOD)
    canvas.blend(0.95 * hard.read(), EXUDATE)


def _bone_spicules(canvas: Canvas, eye: Anatomy, severity: float) -> None:
    rng, spicules = canvas.rng, canvas.mask()
    for x, y in canvas.scatter(int(45 + 45 * severity), (0.0, 0.0), 0.52 - 0.08 * severity, 0.95, eye.disc):
        for angle in rng.uniform(0, 2 * np.pi, 3):
            length = rng.uniform(0.025, 0.06)
            tip = (x + length * np.cos(angle), y + length * np.sin(angle))
            spicules.line([(x, y), tip], rng.uniform(0.008, 0.02))
    canvas.blend(0.9 * spicules.read(), PIGMENT)


def _lens(canvas: Canvas, severity: float) -> None:
    canvas.soften(0.028 + 0.03 * severity)
    canvas.blend(np.full((canvas.size, canvas.size), 0.38 + 0.2 * severity, np.float32), (0.74, 0.62, 0.36))


def _vitreous(canvas: Canvas, severity: float) -> None:
    clouds = expit(1.5 * (canvas.noise(4) + 0.4 * canvas.noise(9) - 0.2 + severity))
    canvas.soften(0.008)
    canvas.blend((0.62 + 0.2 * severity) * clouds, (0.72, 0.68, 0.62))
    strands = canvas.mask(blur=0.012)
    for place in canvas.scatter(4, (0.0, 0.0), 0.0, 0.8):
        steps = np.cumsum(canvas.rng.normal(0, 0.07, (6, 2)), axis=0) + place
        strands.line(steps.tolist(), canvas.rng.uniform(0.015, 0.04))
    canvas.blend(0.4 * strands.read(), (0.30, 0.24, 0.22))


def _cupping(eye: Anatomy, severity: float) -> None:
    eye.cup_ratio = 0.74 + 0.16 * severity
    eye.pallor = 0.25 + 0.25 * severity


def _elongation(eye: Anatomy, severity: float) -> None:
    eye.disc_ratio *= 0.80 - 0.12 * severity
    eye.crescent = 0.75 + 0.8 * severity
    eye.background = (eye.background[0] * 1.06, eye.background[1] * 1.28, eye.background[2] * 1.45)
    eye.choroid = max(eye.choroid, 0.25)


def _tigroid(eye: Anatomy, severity: float) -> None:
    eye.choroid = 0.65 + 0.25 * severity


def _wasting(eye: Anatomy, severity: float) -> None:
    eye.vessel, eye.pallor = 0.75 - 0.3 * severity, 0.8
    eye.periphery = (0.55, 0.56, 0.66)


FINDINGS: dict[str, Finding] = {
    "age-related macular degeneration": Finding(lesions=_drusen),
    "cataract": Finding(optics=_lens),
    "central serous retinopathy": Finding(lesions=_blister),
    "diabetic retinopathy": Finding(lesions=_diabetic),
    "glaucoma": Finding(anatomy=_cupping),
    "media haze": Finding(optics=_vitreous),
    "myopia": Finding(anatomy=_elongation),
    "retinitis": Finding(anatomy=_wasting, lesions=_bone_spicules),
    "diabetic macular edema": Finding(lesions=_macular_edema),
    "tessellation": Finding(anatomy=_tigroid),
}
"""The ten diseases of the paper's benchmark, in its column order."""
