"""Published probes: their columns, and the figures of the paper."""

import json
from collections.abc import Mapping
from importlib.resources import files

from pydantic import BaseModel, ConfigDict

from mgll_encoder.common.errors import unknown_name
from mgll_encoder.data.label_table import Columns


class Benchmark(BaseModel):
    """A published data set, as its label file is laid out.

    Attributes:
        title: What it is.
        image: Template of the image path over the columns.
        labels: Column with labels, unless ``binary``.
        binary: Columns with 0 or 1.
        patient: Column with the patient id.
        only: Labels that count.
        paper: Names in the published figures, with their protocol.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    image: str
    labels: str | None = None
    binary: tuple[str, ...] = ()
    patient: str | None = None
    only: tuple[str, ...] = ()
    paper: dict[str, tuple[str, ...]] = {}

    @property
    def columns(self) -> Columns:
        """Meaning of the columns of its label file."""
        return Columns(self.image, self.labels, self.binary, self.patient)


def benchmarks() -> dict[str, Benchmark]:
    """All published probes that are described, by name."""
    text = files(__package__).joinpath("benchmarks.json").read_text(encoding="utf-8")
    return {name: Benchmark.model_validate(row) for name, row in json.loads(text)["benchmarks"].items()}


def benchmark(name: str) -> Benchmark:
    """The published probe of this name.

    Raises:
        UserError: there is none; the message suggests the nearest.
    """
    known = benchmarks()
    if name not in known:
        raise unknown_name("benchmark", name, known)
    return known[name]


def published_figures(name: str) -> Mapping[str, Mapping[str, float]]:
    """Method -> metric -> figure of the paper in %; empty where it has none."""
    text = files(__package__).joinpath("published_probes.json").read_text(encoding="utf-8")
    figures: Mapping[str, Mapping[str, Mapping[str, float]]] = json.loads(text)["figures"]
    return figures.get(name, {})
