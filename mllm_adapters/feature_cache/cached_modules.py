"""Substitutes for frozen vision modules that return a tower's cached outputs.

The code is independent of families. The modules to replace are found in the model: the outermost ones that
belong to the tower (or to a part that no stage trains) and have no trainable parameters. One forward and
backward pass shows which of their output tensors are used: those for which the loss has a gradient. The
others are returned as NaN, so that an unexpected use cannot go unnoticed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.common.hooks import hooked
from mllm_adapters.core.stages import components

FROZEN = ("tower", "other")
"""Components whose modules can be replaced."""

KEY = "vision_features"
"""Key in a batch for the cached outputs."""


class NotCacheableError(Exception):
    """Why this model's tower cannot be replaced by a cache."""


@dataclass(frozen=True)
class Leaf:
    """A tensor that a replaced module returns.

    Attributes:
        read: Whether the rest of the model reads it.
        dtype: Its dtype.
        trailing: Its shape without the first dimension, along which images are concatenated.
    """

    read: bool
    dtype: torch.dtype
    trailing: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """The output of a replaced module.

    Attributes:
        name: The module.
        spec: Structure of the output (a pytree).
        leaves: The tensors; other values are stored as they are.
    """

    name: str
    spec: Any
    leaves: tuple[Any, ...]

    @property
    def tensors(self) -> tuple[Leaf, ...]:
        """Return the leaves that are tensors."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Leaf))


class CachedModule(nn.Module):
    """Replaces a module for training; it has no parameters."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        self.given: list[Tensor] | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return what the module would have returned for the images of the batch.

        Raises:
            RuntimeError: the batch has no features.
        """
        if self.given is None:
            raise RuntimeError(f"{self.call.name} is replaced by a cache, and the batch has no {KEY}")
        tensors = iter(self.given)
        leaves = [next(tensors) if isinstance(leaf, Leaf) else leaf for leaf in self.call.leaves]
        return pytree.tree_unflatten(leaves, self.call.spec)


def replaceable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost callable modules of tower and `other` without trainable parameters."""
    parts = components(model)
    trains = {name for name, value in model.named_parameters() if value.requires_grad}

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        names = [f"{prefix}{name}" for name, _ in module.named_parameters()]
        callable_ = type(module).forward is not nn.Module.forward  # a ModuleList is not
        if names and callable_ and all(parts.get(n) in FROZEN and n not in trains for n in names):
            yield prefix.removesuffix("."), module
        elif names:
            for name, child in module.named_children():
                yield from walk(child, f"{prefix}{name}.")

    return dict(walk(model, ""))


def record(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Call, ...]:
    """Record the outputs of the modules to replace, and which of them are used.

    Args:
        model: The model, with its stage set.
        batch: Tensors of at least one example with an image, and with labels.

    Raises:
        NotCacheableError: nothing can be replaced, or a module is called more than once.
    """
    modules = replaceable(model)
    with torch.enable_grad(), watched(modules, tracked=True) as seen:
        loss = model(**batch).loss
        flat = [value for outputs in seen.values() for value in outputs[1] if isinstance(value, Tensor)]
        roots = [value for value in flat if value.is_floating_point()]
        if not roots:
            raise NotCacheableError("no module of its tower is frozen as a whole")
        gradients = torch.autograd.grad(loss, roots, allow_unused=True)
    read = {id(root) for root, gradient in zip(roots, gradients, strict=True) if gradient is not None}
    calls = tuple(
        Call(
            name,
            spec,
            tuple(
                Leaf(id(leaf) in read, leaf.dtype, tuple(leaf.shape[1:]))
                if isinstance(leaf, Tensor)
                else leaf
                for leaf in leaves
            ),
        )
        for name, (spec, leaves) in seen.items()
    )
    if not any(leaf.read for call in calls for leaf in call.tensors):
        raise NotCacheableError("the loss does not depend on what its tower returns")
    return calls


Seen = dict[str, tuple[Any, list[Any]]]
"""Module -> structure of its output, and the leaves."""


@contextmanager
def watched(modules: Mapping[str, nn.Module], tracked: bool = False) -> Iterator[Seen]:
    """Yield a dictionary that collects the outputs of modules while the block runs.

    Args:
        modules: Name -> module.
        tracked: Make the outputs leaves of the autograd graph, so that the loss has gradients for them.

    Raises:
        NotCacheableError: a module is called twice.
    """
    seen: Seen = {}

    def note(name: str, output: Any) -> Any:
        if name in seen:
            raise NotCacheableError(f"{name} is called more than once for a batch")
        leaves, spec = pytree.tree_flatten(output)
        kept = [_root(leaf) if tracked else leaf for leaf in leaves]
        seen[name] = spec, kept
        # Not the leaf tensors themselves: the model may modify its inputs in place.
        given = [leaf.clone() if tracked and isinstance(leaf, Tensor) else leaf for leaf in kept]
        return pytree.tree_unflatten(given, spec)

    with hooked(modules, after=note):
        yield seen


def _root(leaf: Any) -> Any:
    """Return a tensor as a leaf of the autograd graph; equal tensors get separate leaves."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().requires_grad_(leaf.is_floating_point())


@dataclass(frozen=True)
class OutputSpec:
    """The cached tensors of an image, and the model inputs that they replace.

    Attributes:
        calls: The replaced modules.
        pixels: Name of each model input with pixels -> its dtype, and its shape without the first dimension.
    """

    calls: tuple[Call, ...]
    pixels: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """Return the output tensors of all replaced modules, in order."""
        return tuple(leaf for call in self.calls for leaf in call.tensors)

    def described(self) -> dict[str, Any]:
        """Describe the plan for a cache key; the place of a tensor among the outputs tells which layer it is of."""
        return {
            "calls": {
                call.name: [
                    [leaf.read, str(leaf.dtype), leaf.trailing] if isinstance(leaf, Leaf) else None
                    for leaf in call.leaves
                ]
                for call in self.calls
            },
            "pixels": {name: [str(dtype), shape] for name, (dtype, shape) in sorted(self.pixels.items())},
        }


class ModelWithCache:
    """A model whose towers are replaced by cached modules; see `cache_features`."""

    def __init__(self, model: nn.Module, plan: OutputSpec) -> None:
        self.model, self.plan = model, plan
        self.towers = {call.name: model.get_submodule(call.name) for call in plan.calls}
        self.stand_ins = {call.name: CachedModule(call) for call in plan.calls}
        self.swap(self.stand_ins)
        self.hook = model.register_forward_pre_hook(self._provide, with_kwargs=True)

    def swap(self, modules: Mapping[str, nn.Module]) -> None:
        """Set modules by name."""
        for name, module in modules.items():
            self.model.set_submodule(name, module)

    def restore(self) -> None:
        """Restore the original model."""
        self.swap(self.towers)
        self.hook.remove()

    @contextmanager
    def towers_back(self) -> Iterator[None]:
        """Restore the towers for a block that encodes images, such as a benchmark during training."""
        device = next(self.model.parameters()).device
        self.swap({name: tower.to(device) for name, tower in self.towers.items()})
        try:
            yield
        finally:
            self.swap(self.stand_ins)
            self.leave()

    def leave(self) -> None:
        """Move the towers off the accelerator: they are not needed in training."""
        for tower in self.towers.values():
            tower.to("cpu")

    def _provide(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Pass features to the cached modules, and placeholders with the shape of pixels to the model."""
        vision = kwargs.pop(KEY, None)
        if vision is None:
            for stand_in in self.stand_ins.values():
                stand_in.given = None
            return args, kwargs
        tensors = iter(self._tensors(vision))
        for stand_in in self.stand_ins.values():
            stand_in.given = [next(tensors) for _ in stand_in.call.tensors]
        for name, (dtype, shape) in self.plan.pixels.items():
            nothing = torch.zeros((), dtype=dtype, device=vision["features"][0].device)
            kwargs[name] = nothing.expand(vision["pixels"][name], *shape)
        return args, kwargs

    def _tensors(self, vision: Mapping[str, Any]) -> Iterator[Tensor]:
        """Yield the outputs of all modules for a batch; unused ones take no memory."""
        features = iter(vision["features"])
        for leaf, length in zip(self.plan.leaves, vision["lengths"], strict=True):
            if leaf.read:
                yield next(features).to(leaf.dtype)
            else:
                fill = float("nan") if leaf.dtype.is_floating_point else 0
                nothing = torch.full((), fill, dtype=leaf.dtype, device=vision["features"][0].device)
                yield nothing.expand(length, *leaf.trailing)


def joined(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Concatenate ``features``, ``lengths`` and ``pixels`` of several images for the cached modules."""
    return {
        "features": [torch.cat(parts) for parts in zip(*(i["features"] for i in images), strict=True)],
        "lengths": [sum(parts) for parts in zip(*(i["lengths"] for i in images), strict=True)],
        "pixels": {name: sum(image["pixels"][name] for image in images) for name in images[0]["pixels"]},
    }


def seen_of_images(seen: Seen, plan: OutputSpec, count: int) -> list[tuple[list[Tensor], list[int]]]:
    """Split module outputs for a batch of equally sized images: per image, the used tensors, and all lengths.

    Raises:
        UserError: the tensors differ from the plan, or cannot be split.
    """
    tensors = [leaf for call in plan.calls for leaf in seen[call.name][1] if isinstance(leaf, Tensor)]
    for leaf, tensor in zip(plan.leaves, tensors, strict=True):
        if tensor.shape[1:] != leaf.trailing or tensor.shape[0] % count:
            raise UnsupportedCheckpointError(
                f"this model's tower returned {tuple(tensor.shape)} for {count} images, and {leaf.trailing} per row "
                "for another: its features cannot be cached; add `feature_cache=False`"
            )
    found = []
    for index in range(count):
        parts = [tensor.chunk(count)[index] for tensor in tensors]
        kept = [part for leaf, part in zip(plan.leaves, parts, strict=True) if leaf.read]
        found.append((kept, [len(part) for part in parts]))
    return found
