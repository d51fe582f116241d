"""Published benchmarks: the layout of their labels, and the paper's results."""

import json
from collections.abc import Mapping
from importlib.resources import files

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mgll_encoder.common.errors import InvalidArgumentError, unknown_name
from mgll_encoder.data.fundus_layouts import layouts
from mgll_encoder.data.label_rows import Columns

LINEAR, FINETUNE = "linear probe", "full fine-tune"
PROTOCOLS = {"linear": LINEAR, "finetune": FINETUNE}
"""``protocol`` of a probe -> protocol of the published results."""


class Benchmark(BaseModel):
    """A published data set and the layout of its labels.

    Attributes:
        title: Its title.
        source: Source of the column names.
        image: Template of the image path over the columns.
        labels: Column with labels, unless ``binary``; alternative names, of which a file has one.
        binary: Columns with 0 or 1.
        folders: Pattern of image paths -> class, for data sets whose file or folder names give the class.
        patient: Column with the patient id.
        nested: Whether images are in subfolders that no column names.
        only: Labels to use.
        names: Label -> its name in words.
        layout: A layout of ``data/fundus_layouts.json`` with the names.
        prompts: Set of prompts for zero-shot classification.
        paper: Name in the published results, if included.
        hint: What the user should know, such as the official test split.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    source: str
    image: str = ""
    labels: tuple[str, ...] = ()
    binary: tuple[str, ...] = ()
    folders: dict[str, str] = {}
    patient: str | None = None
    nested: bool = False
    only: tuple[str, ...] = ()
    names: dict[str, str] = {}
    layout: str | None = None
    prompts: str = "generic"
    paper: str | None = None
    hint: str = ""

    @model_validator(mode="after")
    def _is_labeled(self) -> "Benchmark":
        if not self.folders and not (self.image and (self.labels or self.binary)):
            raise ValueError("neither columns nor folders give the labels")
        return self

    @property
    def tabled(self) -> bool:
        """Whether a label table gives the classes."""
        return bool(self.image)

    @property
    def in_words(self) -> Mapping[str, str]:
        """Label -> its name in words."""
        return {**(layouts()[self.layout].binary if self.layout else {}), **self.names}

    @property
    def columns(self) -> Columns:
        """Meaning of the columns of its label files."""
        label, *aliases = self.labels or (None,)
        return Columns(
            self.image, label, self.binary, self.patient, nested=self.nested, aliases=tuple(map(str, aliases))
        )


class _Benchmarks(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str
    benchmarks: dict[str, Benchmark] = Field(min_length=1)


def benchmarks() -> dict[str, Benchmark]:
    """Return all known data sets, by name."""
    text = files(__package__).joinpath("benchmarks.json").read_text(encoding="utf-8")
    return _Benchmarks.model_validate_json(text).benchmarks


def benchmark(name: str) -> Benchmark:
    """Return a known data set by name.

    Raises:
        UserError: it is not known; the message suggests the closest name.
    """
    known = benchmarks()
    if name not in known:
        raise unknown_name("data set", name, known)
    return known[name]


def published_figures(name: str, protocol: str = LINEAR) -> Mapping[str, Mapping[str, float]]:
    """Return method -> metric -> the paper's result in %; empty if it has none.

    Args:
        name: Name in the published results.
        protocol: `LINEAR` or `FINETUNE`.
    """
    text = files(__package__).joinpath("published_probes.json").read_text(encoding="utf-8")
    figures: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]] = json.loads(text)["figures"]
    return figures.get(name, {}).get(protocol, {})


def published_rows(name: str | None, protocol: str) -> Mapping[str, Mapping[str, float]]:
    """Return the rows that ``--compare paper`` prints.

    Args:
        name: The data set.
        protocol: `LINEAR` or `FINETUNE`.

    Raises:
        UserError: no data set is named, or the paper has no result for it.
    """
    having = [
        known for known, row in benchmarks().items() if row.paper and published_figures(row.paper, protocol)
    ]
    paper = benchmark(name).paper if name else None
    found = published_figures(paper, protocol) if paper else {}
    if not found:
        raise InvalidArgumentError(
            f"`compare=paper` needs `dataset` with published results of a {protocol}: {', '.join(having)}"
        )
    return found
