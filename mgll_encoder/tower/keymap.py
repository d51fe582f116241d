"""Applies key tables: from the tensor names of a checkpoint to those of the transformers model.

State dict in, state dict out; no files are read. A key of the tower that the table of its architecture does not cover
is an error; it is never skipped.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.tower.architectures.base import Architecture, Naming
from mgll_encoder.tower.architectures.clip import PROJECTION
from mgll_encoder.weights.keytable import Destination, Drop, spelt

DROPPED: dict[str, tuple[str, ...]] = {
    "text tower": (
        "text.", "text_model.", "text_projection", "transformer.", "token_embedding.", "positional_embedding",
        "ln_final.", "attn_mask",
    ),
    "temperature": ("logit_scale", "logit_bias"),
    "MGLL cross-attention": ("text2visual.", "visual2text."),
    "OpenAI constants": ("input_resolution", "context_length", "vocab_size"),
}  # fmt: skip
"""Parts of a CLIP outside its vision tower that are left out: group -> key prefixes."""

_FOREIGN = {
    r"\.lora_[AB]\.": "a PEFT adapter without the tower that it was trained on, into which it is to be merged first",
    r"(^|\.)layer1\.0\.conv1\.weight$": "a ResNet",
    r"(^|\.)(rope_embed\.periods|storage_tokens)$|^(model\.)?layer\.0\.layer_scale1\.": "a DINOv3, whose positions "
    "are rotary",
    r"(^|\.)blocks\.0\.gamma_1$": "a DINOv3, EVA or BEiT with timm's names, whose positions are not in a table",
    r"(^|\.)embeds\.(proj|pos_embed)": "a NaFlex ViT, whose images keep their aspect ratio",
    r"(^|\.)(patch_embed\.proj|trunk\.[a-z_0-9.]+)\.(weight|bias)$": "a timm tower that is not a plain ViT",
    r"(^|\.)(embed_tokens|tok_embeddings|wte)\.weight$": "a language model",
}
"""What else a file may contain: regular expression for a key that identifies it -> what it is."""

_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class KeyPlan:
    """Where each key of a checkpoint goes.

    Attributes:
        architecture: The architecture found.
        naming: The naming scheme found.
        prefix: Prefix of the tower's keys, e.g. ``module.clip.visual.``.
        taken: Source key -> where it goes.
        dropped: Tensors left out, counted per group.
        unknown: Keys outside the tower that are in no group (also counted in ``dropped``).
    """

    architecture: Architecture
    naming: Naming
    prefix: str
    taken: dict[str, Destination]
    dropped: dict[str, int]
    unknown: tuple[str, ...]

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict (on any device, including ``meta``) to Hugging Face names.

        Args:
            state: Tensors by source key; must contain all of ``taken``.

        Returns:
            Tensors by their names in the loaded model, and ``PROJECTION`` if there is one.
        """
        parts: dict[str, list[Tensor]] = {}
        for source, place in sorted(self.taken.items(), key=lambda entry: entry[1].part):
            for target, part in zip(place.targets, place.cut(state[source]), strict=True):
                parts.setdefault(target, []).append(part)
        return {target: joined(of_target) for target, of_target in parts.items()}

    @cached_property
    def sources(self) -> dict[str, list[str]]:
        """Name in the loaded model -> source keys, in the order in which they are joined."""
        found: dict[str, list[str]] = {}
        for source, place in sorted(self.taken.items(), key=lambda entry: entry[1].part):
            for target in place.targets:
                found.setdefault(target, []).append(source)
        return found


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the tensor that was stored in these parts."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def plan_keys(keys: Collection[str], where: str) -> KeyPlan:
    """Find the vision tower among the keys of a checkpoint.

    Args:
        keys: All tensor names of the checkpoint.
        where: The file or folder, for error messages.

    Raises:
        UserError: there is no vision tower or more than one, the tower is of another architecture, or one of its keys
            is missing or unknown.
    """
    architecture, naming, prefix = _locate(keys, where)
    taken: dict[str, Destination] = {}
    dropped: Counter[str] = Counter()
    unknown, unexpected = [], []
    around = _enclosing_prefixes(prefix)
    outside = {outer + naming.projection for outer in around} if naming.projection else set()
    for key in keys:
        if key in outside:
            taken[key] = Destination(PROJECTION, (PROJECTION,))
        elif key.startswith(prefix):
            place = naming.table.find(key.removeprefix(prefix))
            if place is None:
                unexpected.append(key)
            elif place.targets:
                taken[key] = place
            else:
                dropped[place.rule.reason if isinstance(place.rule, Drop) else "position counter"] += 1
        elif group := _group(key, around):
            dropped[group] += 1
        else:
            unknown.append(key)
            dropped[f"other: {key.split('.')[0]}"] += 1
    if unexpected:
        raise UnsupportedCheckpointError(
            f"{where}: the vision tower has {_quote(unexpected)}, which a {architecture.title} does not have: "
            f"expected a plain {architecture.title} ({_either(n.name for n in architecture.namings)}); merge adapters "
            "into the weights first"
        )
    if missing := _missing(naming, prefix, taken):
        with_class = " with a class token" if architecture.leading else ""
        raise UnsupportedCheckpointError(
            f"{where}: the vision tower lacks {_quote(missing)}: "
            f"expected every tensor of a {architecture.title}{with_class}; save the whole tower again"
        )
    return KeyPlan(architecture, naming, prefix, taken, dict(sorted(dropped.items())), tuple(unknown))


def _locate(keys: Collection[str], where: str) -> tuple[Architecture, Naming, str]:
    present = set(keys)
    found = [
        (architecture, naming, prefix)
        for architecture in ARCHITECTURES.values()
        for naming in architecture.namings
        for prefix in sorted(k.removesuffix(naming.anchor) for k in present if k.endswith(naming.anchor))
        if (not prefix or prefix.endswith("."))
        and all(any(k.startswith(prefix + more) for k in present) for more in naming.present)
        and not any(prefix + other in present for other in naming.absent)
    ]
    if len(found) > 1:
        names = ", ".join(f"'{prefix}'" for _, _, prefix in found)
        raise UnsupportedCheckpointError(
            f"{where}: found {len(found)} vision towers, at {names}: expected one; save it alone"
        )
    if not found:
        foreign = next((what for p, what in _FOREIGN.items() if any(re.search(p, k) for k in present)), None)
        what = f"this looks like {foreign}" if foreign else f"its keys are {_quote(sorted(present), 3)}"
        titles = _either(architecture.title for architecture in ARCHITECTURES.values())
        raise UnsupportedCheckpointError(
            f"{where}: no supported vision tower among {len(present)} tensors, {what}: expected a {titles} "
            "with keys such as 'visual.conv1.weight' or 'vision_model.embeddings.patch_embedding.weight'"
        )
    return found[0]


def _missing(naming: Naming, prefix: str, taken: Collection[str]) -> list[str]:
    layers = {found[0] for key in taken if (found := _LAYER.search(key.removeprefix(prefix)))}
    required = [
        name
        for pattern, rule in naming.table.rules.items()
        if rule and not isinstance(rule, Drop) and pattern not in naming.optional
        for name in spelt(pattern)
    ]
    expected = {
        prefix + name.replace("{}", str(layer))
        for name in required
        for layer in range(len(layers) if "{}" in name else 1)
    }
    return sorted(expected - set(taken))


def _enclosing_prefixes(prefix: str) -> list[str]:
    parts = prefix.split(".")[:-1]
    return ["".join(f"{part}." for part in parts[:n]) for n in range(len(parts), -1, -1)]


def _group(key: str, around: list[str]) -> str | None:
    for outer in around:
        if key.startswith(outer):
            inner = key.removeprefix(outer)
            for group, beginnings in DROPPED.items():
                if inner.startswith(beginnings):
                    return group
    return None


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _quote(keys: list[str], most: int = 2) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(f"'{key}'" for key in keys[:most]) + rest
