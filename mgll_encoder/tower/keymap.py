"""Key tables: the tensors of a foreign checkpoint, and their names in a Hugging Face ``CLIPVisionModel``.

State dict in, state dict out; no file is touched here. ``{}`` stands for the layer number, ``None`` for a
tensor that is known and left out. A key of the tower that is in no table is an error, never a skip.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.weights.keytable import Destination, KeyTable, Rule, Split, Transpose, targets

PROJECTION = "visual_projection.weight"
"""Name given to the projection into the image-text space, [projection_dim, width]."""


_OPEN_CLIP: dict[str, Rule] = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",  # the spelling is Hugging Face's
    "ln_pre.bias": "pre_layrnorm.bias",
    "transformer.resblocks.{}.ln_1.weight": "encoder.layers.{}.layer_norm1.weight",
    "transformer.resblocks.{}.ln_1.bias": "encoder.layers.{}.layer_norm1.bias",
    "transformer.resblocks.{}.attn.in_proj_weight": Split("encoder.layers.{}.self_attn.{q,k,v}_proj.weight"),
    "transformer.resblocks.{}.attn.in_proj_bias": Split("encoder.layers.{}.self_attn.{q,k,v}_proj.bias"),
    "transformer.resblocks.{}.attn.out_proj.weight": "encoder.layers.{}.self_attn.out_proj.weight",
    "transformer.resblocks.{}.attn.out_proj.bias": "encoder.layers.{}.self_attn.out_proj.bias",
    "transformer.resblocks.{}.ln_2.weight": "encoder.layers.{}.layer_norm2.weight",
    "transformer.resblocks.{}.ln_2.bias": "encoder.layers.{}.layer_norm2.bias",
    "transformer.resblocks.{}.mlp.c_fc.weight": "encoder.layers.{}.mlp.fc1.weight",
    "transformer.resblocks.{}.mlp.c_fc.bias": "encoder.layers.{}.mlp.fc1.bias",
    "transformer.resblocks.{}.mlp.c_proj.weight": "encoder.layers.{}.mlp.fc2.weight",
    "transformer.resblocks.{}.mlp.c_proj.bias": "encoder.layers.{}.mlp.fc2.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
    "proj": Transpose(PROJECTION),
}

OPTIONAL = "proj"
"""The one key that a tower can do without."""

OPEN_CLIP_BLOCKS = KeyTable({name: rule for name, rule in _OPEN_CLIP.items() if "resblocks" in name})
"""The transformer blocks, which are the same in the image and in the text tower."""

_OUR_NAMES = [target for rule in _OPEN_CLIP.values() for target in targets(rule, ("{}",))]

_TRANSFORMERS: dict[str, Rule] = {
    **{name: name for name in _OUR_NAMES if name != PROJECTION},
    "embeddings.position_ids": None,  # a counter that transformers wrote before 4.31
}


@dataclass(frozen=True)
class Naming:
    """A naming scheme of CLIP vision towers.

    Attributes:
        name: ``open_clip`` or ``transformers``.
        anchor: The key whose prefix is the tower's prefix.
        block: Beginning of the keys of the transformer blocks.
        table: The table, keys relative to the tower's prefix.
        projection: Key of the projection relative to a prefix *around* the tower, where it lies outside.
    """

    name: str
    anchor: str
    block: str
    table: KeyTable
    projection: str | None = None


NAMINGS = (
    Naming("open_clip", "conv1.weight", "transformer.resblocks.", KeyTable(_OPEN_CLIP)),
    Naming(
        "transformers",
        "embeddings.patch_embedding.weight",
        "encoder.layers.",
        KeyTable(_TRANSFORMERS),
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
    r"\.lora_[AB]\.": "a PEFT adapter without the tower that it was trained on, into which it is to be merged first",
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
        naming: The naming scheme found.
        prefix: What stands before the tower's keys, e.g. ``module.clip.visual.``.
        taken: Source key -> where it goes.
        dropped: Tensors left out, counted per group.
        unknown: Keys outside the tower that are in no group (also counted in ``dropped``).
    """

    naming: Naming
    prefix: str
    taken: dict[str, Destination]
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
            for source, place in self.taken.items()
            for target, part in zip(place.targets, place.cut(state[source]), strict=True)
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
    naming, prefix = _locate(keys, where)
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
                dropped["position counter"] += 1
        elif group := _group(key, around):
            dropped[group] += 1
        else:
            unknown.append(key)
            dropped[f"other: {key.split('.')[0]}"] += 1
    if unexpected:
        raise UnsupportedCheckpointError(
            f"{where}: the vision tower has {_quote(unexpected)}, which a CLIP ViT does not have: "
            "expected a plain CLIP ViT (open_clip or transformers); merge adapters into the weights first"
        )
    if missing := _missing(naming, prefix, taken):
        raise UnsupportedCheckpointError(
            f"{where}: the vision tower lacks {_quote(missing)}: "
            "expected every tensor of a CLIP ViT with a class token; save the whole tower again"
        )
    return KeyPlan(naming, prefix, taken, dict(sorted(dropped.items())), tuple(unknown))


def _locate(keys: Collection[str], where: str) -> tuple[Naming, str]:
    present = set(keys)
    found = [
        (naming, prefix)
        for naming in NAMINGS
        for prefix in sorted(k.removesuffix(naming.anchor) for k in present if k.endswith(naming.anchor))
        if (not prefix or prefix.endswith(".")) and any(k.startswith(prefix + naming.block) for k in present)
    ]
    if len(found) > 1:
        names = ", ".join(f"'{prefix}'" for _, prefix in found)
        raise UnsupportedCheckpointError(
            f"{where}: found {len(found)} vision towers, at {names}: expected one; save it alone"
        )
    if not found:
        foreign = next((what for p, what in _FOREIGN.items() if any(re.search(p, k) for k in present)), None)
        what = f"this looks like {foreign}" if foreign else f"its keys are {_quote(sorted(present), 3)}"
        raise UnsupportedCheckpointError(
            f"{where}: no CLIP vision tower among {len(present)} tensors, {what}: "
            "expected a CLIP ViT with keys such as 'visual.conv1.weight' or "
            "'vision_model.embeddings.patch_embedding.weight'"
        )
    naming, prefix = found[0]
    if f"{prefix}embeddings.patch_embedding.bias" in present:
        raise UnsupportedCheckpointError(
            f"{where}: the vision tower has a patch bias (SigLIP, EVA): expected a CLIP ViT"
        )
    return naming, prefix


def _missing(naming: Naming, prefix: str, taken: Collection[str]) -> list[str]:
    layers = {found[0] for key in taken if (found := _LAYER.search(key.removeprefix(prefix)))}
    required = [pattern for pattern, rule in naming.table.rules.items() if rule and pattern != OPTIONAL]
    expected = {
        prefix + pattern.replace("{}", str(layer))
        for pattern in required
        for layer in range(len(layers) if "{}" in pattern else 1)
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


def _quote(keys: list[str], most: int = 2) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(f"'{key}'" for key in keys[:most]) + rest
