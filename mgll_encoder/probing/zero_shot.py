"""Zero-shot classification: image features compared with text features of class prompts."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.special import expit, softmax
from torch import Tensor
from torch.nn.functional import normalize

from mgll_encoder.common.errors import BadDataError, UnsupportedCheckpointError, unknown_name
from mgll_encoder.common.texts import read_text
from mgll_encoder.data.fundus import read_explanations
from mgll_encoder.text.text_tower import TextTower
from mgll_encoder.tower.model import Tower


class LabelPrompts(BaseModel):
    """Prompt settings of one label.

    Attributes:
        names: Replacements of ``{label}``, all of which are used; empty for the label itself.
        negatives: Negative templates, instead of those of the set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()


class Prompts(BaseModel):
    """Prompts for a domain; see ``prompts.json``.

    Attributes:
        templates: Templates that state a label.
        negatives: Templates that negate it.
        labels: Settings of individual labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    templates: tuple[str, ...] = Field(min_length=1)
    negatives: tuple[str, ...] = Field(min_length=1)
    labels: dict[str, LabelPrompts] = {}

    def positive(self, label: str, names: Mapping[str, str]) -> list[str]:
        """Return the prompts that state a label.

        Args:
            label: The label, as in the label file.
            names: Label -> its name in words, for label files with abbreviations.

        Raises:
            UserError: no template can be filled.
        """
        return self._filled(self.templates, label, names)

    def negative(self, label: str, names: Mapping[str, str]) -> list[str]:
        """Return the prompts that negate a label; arguments and errors as for `positive`."""
        own = self._special(label, names).negatives
        return self._filled(own or self.negatives, label, names)

    def _special(self, label: str, names: Mapping[str, str]) -> LabelPrompts:
        return self.labels.get(label) or self.labels.get(names.get(label, label)) or LabelPrompts()

    def _filled(self, templates: Sequence[str], label: str, names: Mapping[str, str]) -> list[str]:
        filled = []
        for name in self._special(label, names).names or (names.get(label, label),):
            words = {"label": name, "explanation": _explanations().get(name, "")}
            filled += [
                t.format_map(words) for t in templates if "{explanation}" not in t or words["explanation"]
            ]
        if not filled:
            raise BadDataError(
                f"label '{label}' has no prompt: every template needs an explanation, and it has none"
            )
        return list(dict.fromkeys(filled))


def prompt_sets() -> dict[str, Prompts]:
    """Return the packaged sets, by name."""
    text = files(__package__).joinpath("prompts.json").read_text(encoding="utf-8")
    return {name: Prompts.model_validate(row) for name, row in json.loads(text)["sets"].items()}


def read_prompts(name: str) -> Prompts:
    """Read a packaged set by its name, or a set from a file.

    Raises:
        UserError: there is no such set, or the file is invalid.
    """
    path = Path(name)
    if path.suffix != ".json":
        known = prompt_sets()
        if name not in known:
            raise unknown_name("set of prompts (or a .json file)", name, known)
        return known[name]
    try:
        prompts = Prompts.model_validate_json(read_text(path, "`prompts`"))
        for template in (*prompts.templates, *prompts.negatives):
            template.format_map({"label": "", "explanation": ""})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadDataError(
            f"prompts file {path}: '{where}': {first['msg']}; expected one set, such as "
            '{"templates": ["{label}"], "negatives": ["no {label}"]}'
        ) from None
    except (KeyError, ValueError, IndexError) as error:
        raise BadDataError(
            f"prompts file {path}: a template has a placeholder {error}: expected {{label}} or {{explanation}}"
        ) from None
    return prompts


def projected(tower: Tower, features: NDArray[np.floating]) -> NDArray[np.float32]:
    """Project pooled features [n, width] into the shared image-text space, with unit norm, [n, D].

    Raises:
        UserError: the tower has no projection.
    """
    if (shared := tower.into_shared) is None:
        raise UnsupportedCheckpointError(
            f"tower {tower.header.source} has no projection into the image-text space"
        )
    with torch.inference_mode():
        return normalize(torch.from_numpy(features) @ shared.float().T, dim=1).numpy()


def class_directions(text: TextTower, prompts: Sequence[Sequence[str]]) -> NDArray[np.float32]:
    """Compute one unit vector per class: the normalized mean of its prompts' normalized features.

    Args:
        text: The text tower.
        prompts: The prompts of each class.

    Returns:
        [classes, D].
    """
    distinct = list(dict.fromkeys(prompt for group in prompts for prompt in group))
    with torch.inference_mode():
        features: Tensor = normalize(text.features(distinct).float(), dim=1)
    place = {prompt: i for i, prompt in enumerate(distinct)}
    means = [features[[place[prompt] for prompt in group]].mean(dim=0) for group in prompts]
    return normalize(torch.stack(means), dim=1).numpy()


def unknown_pieces(text: TextTower, prompts: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Return, for each prompt with any, its pieces without an embedding, which the text tower ignores."""
    found = {prompt: text.unknown(prompt) for group in prompts for prompt in group}
    return {prompt: pieces for prompt, pieces in found.items() if pieces}


def zero_shot_scores(
    images: NDArray[np.floating],
    positive: NDArray[np.floating],
    negative: NDArray[np.floating],
    temperature: float,
    exclusive: bool,
) -> NDArray[np.float64]:
    """Compute probabilities of labels for images.

    Args:
        images: Normalized image features, [n, D].
        positive: Directions of the labels, [labels, D].
        negative: Directions of their absence, [labels, D]; unused for exclusive labels.
        temperature: The τ of the towers.
        exclusive: Whether exactly one label is true of an image.

    Returns:
        [n, labels]: for exclusive labels a softmax over the labels; otherwise of each label against its absence.
    """
    similar = images.astype(np.float64) @ positive.T.astype(np.float64)
    if exclusive:
        return np.asarray(softmax(similar / temperature, axis=1))
    return np.asarray(expit((similar - images.astype(np.float64) @ negative.T) / temperature))


@cache
def _explanations() -> Mapping[str, str]:
    return read_explanations().explanations
