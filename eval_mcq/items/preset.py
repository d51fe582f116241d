"""Presets: the diseases of a benchmark, their names and labels. They are data files, not code."""

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eval_mcq.items.schema import Text, parse
from mgll_encoder.common.errors import (
    BadDataError,
    InvalidArgumentError,
    NotFoundError,
    UnknownNameError,
    unknown_name,
)
from mgll_encoder.common.texts import read_text
from mgll_encoder.data.fundus_layouts import GENERIC, layouts
from mgll_encoder.data.label_cells import plain

FOLDER = Path(__file__).parents[1] / "presets"
"""The packaged presets, one JSON file each."""

OTHERS = "to ask about others, give a preset of your own (`preset=FILE.json`, see docs/formats.md#preset)"


class Choice(BaseModel):
    """An option of a disease with its own options.

    Attributes:
        text: The text of the option.
        labels: The option is true of images with all of these labels ...
        without: ... and none of these.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Text
    labels: list[Text] = Field(min_length=1)
    without: list[Text] = []

    def fits(self, labels: set[str]) -> bool:
        """Return whether the option is true of an image with these (normalized) labels."""
        return {plain(w) for w in self.labels} <= labels and not {plain(w) for w in self.without} & labels


class Disease(BaseModel):
    """A disease, which is one category of the benchmark.

    Attributes:
        name: Column name in tables.
        option: Full name, used as option text.
        labels: Spellings of the label in label files, compared without case.
        not_against: Names of diseases that are never distractors for this one, nor this one for them: one implies the
            other, or label files commonly omit it (a cataract is a media opacity).
        left_open_by: Labels that leave it open whether an image also has this disease, which is then not a distractor
            (a chorioretinitis is not labeled retinitis, but "retinitis" is not a wrong answer).
        where: Column values that a row must have for questions about this disease; replaces the preset's.
        choices: The disease's own options instead of the names of other diseases; at most one may be true of an image.
            Such a disease is not a distractor for others.
        question: The disease's own question.
        balance: Keep as many questions of each true choice as the rarest one has (random, seeded), so that a model that
            always gives the same answer scores at chance.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    option: Text
    labels: list[Text] = Field(min_length=1)
    not_against: list[Text] = []
    left_open_by: list[Text] = []
    where: dict[str, str] | None = None
    choices: list[Choice] = []
    question: str = ""
    balance: bool = False

    @model_validator(mode="after")
    def _choices_make_sense(self) -> "Disease":
        if len(self.choices) == 1:
            raise ValueError(f"'{self.name}' has a single choice: give two or more, or none")
        if self.balance and not self.choices:
            raise ValueError(f"'{self.name}' has balance, but no choices")
        return self

    def is_true_of(self, labels: set[str]) -> bool:
        """Return whether an image with these (normalized) labels has the disease."""
        return any(plain(label) in labels for label in self.labels)

    def fitting(self, labels: Collection[str]) -> list[str]:
        """Return the choices that are true of an image with these (normalized) labels."""
        return [choice.text for choice in self.choices if choice.fits(set(labels))]

    def is_left_open_by(self, labels: set[str]) -> bool:
        """Return whether (normalized) labels of an image leave it open if this disease is present."""
        return any(plain(label) in labels for label in self.left_open_by)

    def is_mentioned_in(self, words: str) -> bool:
        """Return whether the annotators' (normalized) words mention the disease, even as a suspicion."""
        return any(re.search(rf"\b{re.escape(plain(name))}\b", words) for name in [self.option, *self.labels])


class Preset(BaseModel):
    """A set of diseases with the question that is asked about them.

    Attributes:
        name: Its name for ``--preset``; also the name of the benchmark.
        version: Incremented whenever the question, an option or a rule changes; recorded in the benchmark.
        about: Origin and caveats, for the reader.
        question: The question of every item.
        options: Number of options per question.
        where: Column values that a row of the label file must have.
        diseases: In the order of the table.
        other_labels: Labels of such files without questions, exempt from the check for misspellings.
        layout: Published layout of the label file (`mgll_encoder.data.fundus_layouts`), or ``generic``.
        confusable: Groups of diseases that are easily confused, for hard distractors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    about: str = ""
    question: Text
    options: int = Field(default=4, ge=2, le=26)
    where: dict[str, str] = {}
    diseases: list[Disease] = Field(min_length=2)
    other_labels: list[Text] = []
    version: int = 1
    layout: str = GENERIC
    confusable: list[list[Text]] = []

    @model_validator(mode="after")
    def _names_fit(self) -> "Preset":
        names = [disease.name for disease in self.diseases]
        counts = Counter(plain(name) for name in names)
        counts.update(plain(d.option) for d in self.diseases if plain(d.option) != plain(d.name))
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"two diseases are called '{twice[0]}'")
        for group in self.confusable:
            for name in group:
                if name not in names:
                    raise ValueError(f"confusable has '{name}', which is not a disease of the preset")
        if self.layout != GENERIC and self.layout not in layouts():
            raise ValueError(f"layout '{self.layout}' is not one of {', '.join([GENERIC, *layouts()])}")
        for disease in self.diseases:
            for other in disease.not_against:
                if other not in names:
                    raise ValueError(
                        f"'{disease.name}' is not_against '{other}', which is not a disease of the preset"
                    )
        return self

    def against(self, disease: Disease) -> list[Disease]:
        """Return the possible distractors for a disease; diseases with their own choices are excluded."""
        return [
            other
            for other in self.diseases
            if not other.choices
            and other.name != disease.name
            and other.name not in disease.not_against
            and disease.name not in other.not_against
        ]

    def check_options(self) -> None:
        """Refuse more options than there are diseases.

        Raises:
            UserError: a disease has too few distractors, whatever the image.
        """
        for disease in self.diseases:
            if not disease.choices and len(found := self.against(disease)) < self.options - 1:
                raise BadDataError(
                    f"preset '{self.name}' has {len(found)} distractors for '{disease.name}', {self.options} options "
                    f"need {self.options - 1}: ask for fewer with `options`, or for more diseases"
                )

    def confused_with(self, disease: Disease) -> set[str]:
        """Return the names of the diseases that are confusable with this one."""
        return {name for group in self.confusable if disease.name in group for name in group} - {disease.name}

    def only(self, names: list[str]) -> "Preset":
        """Return the preset with some of its diseases, in the same order.

        The labels of all diseases stay known; excluded diseases are neither answers nor distractors.

        Raises:
            UserError: a name is unknown, or fewer than two remain.
        """
        by_plain = {plain(disease.name): disease for disease in self.diseases}
        for name in names:
            if plain(name) not in by_plain:
                error = unknown_name(
                    f"disease of preset '{self.name}'", name, [d.name for d in self.diseases]
                )
                raise UnknownNameError(f"{error}; {OTHERS}")
        wanted = {plain(name) for name in names}
        kept = [d for d in self.diseases if plain(d.name) in wanted]
        dropped = [d for d in self.diseases if plain(d.name) not in wanted]
        if len(kept) < 2:
            raise InvalidArgumentError(
                f"`diseases` names {len(kept)} disease: give at least two, because the others are the distractors"
            )
        left = {d.name for d in kept}
        return self.model_copy(
            update={
                "diseases": [
                    d.model_copy(update={"not_against": [o for o in d.not_against if o in left]})
                    for d in kept
                ],
                "other_labels": [*self.other_labels, *(label for d in dropped for label in d.labels)],
                "confusable": [[name for name in group if name in left] for group in self.confusable],
            }
        )


def preset_names() -> list[str]:
    """Return the names of the packaged presets."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_preset(name_or_file: str) -> Preset:
    """Load a preset by name, or from a JSON file of the same form.

    Raises:
        UserError: the name is unknown, there is no such file, or the file is not a preset.
    """
    path = Path(name_or_file)
    if path.suffix != ".json":
        if name_or_file not in preset_names():
            raise unknown_name("preset (or give a .json file)", name_or_file, preset_names())
        path = FOLDER / f"{name_or_file}.json"
    if not path.is_file():
        raise NotFoundError(
            f"preset file {path} does not exist: known presets are {', '.join(preset_names())}"
        )
    return parse(Preset, read_text(path, "preset"), f"preset {path}")
