"""Key tables: the tensors of a foreign checkpoint, and their names in a Hugging Face ``CLIPVisionModel``.

State dict in, state dict out; no file is touched here. ``{}`` stands for the layer number, ``None`` for a
tensor that is known and left out. A key of the tower that is in no table is an error, never a skip.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from mgll_encoder.common.errors import UserError

PROJECTION = "visual_projection.weight"
"""Name given to the projection into the image-text space, [projection_dim, width]."""


@dataclass(frozen=True)
class Rule:
    """Where a source tensor goes: its new names, and how it is cut into them."""

    targets: tuple[str, ...]
    cut: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)
    optional: bool = False


def _to(target: str) -> Rule:
    return Rule((target,))


def _query_key_value(kind: str) -> Rule:
    targets = tuple(f"encoder.layers.{{}}.self_attn.{x}_proj.{kind}" for x in "qkv")
    return Rule(targets, lambda tensor: tensor.chunk(3))


_OPEN_CLIP: dict[str, Rule | None] = {
    "class_embedding": _to("embeddings.class_embedding"),
    "conv1.weight": _to("embeddings.patch_embedding.weight"),
    "positional_embedding": _to("embeddings.position_embedding.weight"),
    "ln_pre.weight": _to("pre_layrnorm.weight"),  # the spelling is Hugging Face's
    "ln_pre.bias": _to("pre_layrnorm.bias"),
    "transformer.resblocks.{}.ln_1.weight": _to("encoder.layers.{}.layer_norm1.weight"),
    "transformer.resblocks.{}.ln_1.bias": _to("encoder.layers.{}.layer_norm1.bias"),
    "transformer.resblocks.{}.attn.in_proj_weight": _query_key_value("weight"),
    "transformer.resblocks.{}.attn.in_proj_bias": _query_key_value("bias"),
    "transformer.resblocks.{}.attn.out_proj.weight": _to("encoder.layers.{}.self_attn.out_proj.weight"),
    "transformer.resblocks.{}.attn.out_proj.bias": _to("encoder.layers.{}.self_attn.out_proj.bias"),
    "transformer.resblocks.{}.ln_2.weight": _to("encoder.layers.{}.layer_norm2.weight"),
    "transformer.resblocks.{}.ln_2.bias": _to("encoder.layers.{}.layer_norm2.bias"),
    "transformer.resblocks.{}.mlp.c_fc.weight": _to("encoder.layers.{}.mlp.fc1.weight"),
    "transformer.resblocks.{}.mlp.c_fc.bias": _to("encoder.layers.{}.mlp.fc1.bias"),
    "transformer.resblocks.{}.mlp.c_proj.weight": _to("encoder.layers.{}.mlp.fc2.weight"),
    "transformer.resblocks.{}.mlp.c_proj.bias": _to("encoder.layers.{}.mlp.fc2.bias"),
    "ln_post.weight": _to("post_layernorm.weight"),
    "ln_post.bias": _to("post_layernorm.bias"),
    "proj": Rule((PROJECTION,), lambda tensor: (tensor.T,), optional=True),
}

OPEN_CLIP_BLOCKS = {
    name.removeprefix("transformer.resblocks.{}."): rule
    for name, rule in _OPEN_CLIP.items()
    if rule and name.startswith("transformer.resblocks.{}.")
}
"""Within a transformer block, which is the same in the image and in the text tower."""

_OUR_NAMES = [
    target for rule in _OPEN_CLIP.values() if rule for target in rule.targets if target != PROJECTION
]

_TRANSFORMERS: dict[str, Rule | None] = {
    **{name: _to(name) for name in _OUR_NAMES},
    "embeddings.position_ids": None,  # a counter that transformers wrote before 4.31
}


@dataclass(frozen=True)
class KeyTable:
    """A naming scheme of CLIP vision towers.

    Attributes:
        name: ``open_clip`` or ``transformers``.
        anchor: The key whose prefix is the tower's prefix.
        block: Beginning of the keys of the transformer blocks.
        rules: The table, keys relative to the tower's prefix.
        projection: Key of the projection relative to a prefix *around* the tower, where it lies outside.
    """

    name: str
    anchor: str
    block: str
    rules: dict[str, Rule | None]
    projection: str | None = None


TABLES = (
    KeyTable("open_clip", "conv1.weight", "transformer.resblocks.", _OPEN_CLIP),
    KeyTable(
        "transformers",
        "embeddings.patch_embedding.weight",
        "encoder.layers.",
        _TRANSFORMERS,
        projection=PROJECTION,
    ),
)

DROPPED: dict[str, tuple[str, ...]] = {
    "text tower": (
        "text.", "text_model.", "text_projection", "transformer.", "token_embedding.", "positional_embedding",
        "ln_final.", "attn_mask",
    ),
    "temperature": ("logit_scale", "logit_bias"),
    "MGLL cross-attention": ("text2visual.", "visual2text."),
    "OpenAI constants": ("input_resolution", "context_length", "vocab_size"),
}  # fmt: skip
"""Parts of a CLIP around its vision tower, known and left out: group -> beginnings of keys."""

_FOREIGN = {
    r"(^|\.)layer1\.0\.conv1\.weight$": "a ResNet",
    r"(^|\.)(patch_embed\.proj|trunk\.[a-z_0-9.]+)\.(weight|bias)$": "a timm, EVA or SigLIP tower",
    r"(^|\.)(embed_tokens|tok_embeddings|wte)\.weight$": "a language model",
}
"""What else a file may hold, by a key that tells."""

_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class KeyPlan:
    """What becomes of every key of a checkpoint.

    Attributes:
        table: The naming scheme found.
        prefix: What stands before the tower's keys, e.g. ``module.clip.visual.``.
        taken: Source key -> rule with the layer number filled in.
        dropped: Tensors left out, counted per group.
        unknown: Keys outside the tower that are in no group (also counted in ``dropped``).
    """

    table: KeyTable
    prefix: str
    taken: dict[str, Rule]
    dropped: dict[str, int]
    unknown: tuple[str, ...]

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict (on any device, ``meta`` too) to Hugging Face names.

        Args:
            state: Tensors by source key; must hold all of ``taken``.

        Returns:
            Tensors by ``CLIPVisionModel`` key without ``vision_model.``, and ``PROJECTION`` if there is one.
        """
        return {
            target: part
            for source, rule in self.taken.items()
            for target, part in zip(rule.targets, rule.cut(state[source]), strict=True)
        }


def plan_keys(keys: Collection[str], where: str) -> KeyPlan:
    """Find the CLIP vision tower among the keys of a checkpoint.

    Args:
        keys: All tensor names of the checkpoint.
        where: The file or folder, for error messages.

    Raises:
        UserError: there is no CLIP vision tower or more than one, the tower is of another architecture, or
            one of its keys is missing or unknown.
    """
    table, prefix = _locate(keys, where)
    taken: dict[str, Rule] = {}
    dropped: Counter[str] = Counter()
    unknown, unexpected = [], []
    around = _enclosing_prefixes(prefix)
    outside = {outer + table.projection for outer in around} if table.projection else set()
    for key in keys:
        pattern, layer = _pattern(key.removeprefix(prefix))
        if key in outside:
            taken[key] = _to(PROJECTION)
        elif key.startswith(prefix) and pattern not in table.rules:
            unexpected.append(key)
        elif key.startswith(prefix) and (rule := table.rules[pattern]):
            taken[key] = Rule(tuple(t.format(layer) for t in rule.targets), rule.cut)
        elif key.startswith(prefix):
            dropped["position counter"] += 1
        elif group := _group(key, around):
            dropped[group] += 1
        else:
            unknown.append(key)
            dropped[f"other: {key.split('.')[0]}"] += 1
    if unexpected:
        raise UserError(
            f"{where}: the vision tower has {_quote(unexpected)}, which a CLIP ViT does not have: "
            "expected a plain CLIP ViT (open_clip or transformers); merge adapters into the weights first"
        )
    if missing := _missing(table, prefix, taken):
        raise UserError(
            f"{where}: the vision tower lacks {_quote(missing)}: "
            "expected every tensor of a CLIP ViT with a class token; save the whole tower again"
        )
    return KeyPlan(table, prefix, taken, dict(sorted(dropped.items())), tuple(unknown))


def _locate(keys: Collection[str], where: str) -> tuple[KeyTable, str]:
    present = set(keys)
    found = [
        (table, prefix)
        for table in TABLES
        for prefix in sorted(k.removesuffix(table.anchor) for k in present if k.endswith(table.anchor))
        if (not prefix or prefix.endswith(".")) and any(k.startswith(prefix + table.block) for k in present)
    ]
    if len(found) > 1:
        names = ", ".join(f"'{prefix}'" for _, prefix in found)
        raise UserError(f"{where}: found {len(found)} vision towers, at {names}: expected one; save it alone")
    if not found:
        foreign = next((what for p, what in _FOREIGN.items() if any(re.search(p, k) for k in present)), None)
        what = f"this looks like {foreign}" if foreign else f"its keys are {_quote(sorted(present), 3)}"
        raise UserError(
            f"{where}: no CLIP vision tower among {len(present)} tensors, {what}: "
            "expected a CLIP ViT with keys such as 'visual.conv1.weight' or "
            "'vision_model.embeddings.patch_embedding.weight'"
        )
    table, prefix = found[0]
    if f"{prefix}embeddings.patch_embedding.bias" in present:
        raise UserError(f"{where}: the vision tower has a patch bias (SigLIP, EVA): expected a CLIP ViT")
    return table, prefix


def _missing(table: KeyTable, prefix: str, taken: Collection[str]) -> list[str]:
    layers = {layer for key in taken if (layer := _pattern(key.removeprefix(prefix))[1])}
    required = [pattern for pattern, rule in table.rules.items() if rule and not rule.optional]
    expected = {
        prefix + pattern.replace("{}", str(layer))
        for pattern in required
        for layer in range(len(layers) if "{}" in pattern else 1)
    }
    return sorted(expected - set(taken))


def _pattern(key: str) -> tuple[str, str]:
    """``encoder.layers.3.mlp`` -> (``encoder.layers.{}.mlp``, ``3``); no layer is the empty string."""
    match = _LAYER.search(key)
    return (key, "") if match is None else (key[: match.start()] + "{}" + key[match.end() :], match[0])


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


def _quote(keys: list[str], most: int = 2) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(f"'{key}'" for key in keys[:most]) + rest
