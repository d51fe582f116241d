"""The description of an architecture of vision encoders.

Nothing here imports transformers: planning a swap and inspecting a tower need only this description, and importing a
class takes seconds. Tests compare every description with the library that defines the architecture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from mgll_encoder.weights.keytable import KeyTable

if TYPE_CHECKING:
    from torch import Tensor

    from mgll_encoder.tower.spec import TowerSpec

CHANNELS = 3

Shapes = dict[str, tuple[int, ...]]


def affine(layers: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Return the shapes of weights and biases of layers, from the shapes of their weights."""
    return {
        **{f"{name}.weight": shape for name, shape in layers.items()},
        **{f"{name}.bias": shape[:1] for name, shape in layers.items()},
    }


def mlp(spec: "TowerSpec") -> Shapes:
    """Return the shapes of the weights of an MLP."""
    return {"mlp.fc1": (spec.mlp_width, spec.width), "mlp.fc2": (spec.width, spec.mlp_width)}


def encoder_layers(spec: "TowerSpec") -> Shapes:
    """Return the shapes of the weights of the blocks that CLIP and SigLIP share."""
    width = spec.width
    block = {
        "layer_norm1": (width,),
        "layer_norm2": (width,),
        **{f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")},
        **mlp(spec),
    }
    return {
        f"encoder.layers.{number}.{name}": shape
        for number in range(spec.depth)
        for name, shape in block.items()
    }


class ConfigFields(BaseModel):
    """The fields of a tower's config.json that are read, with the defaults of its transformers configuration.

    A field with a single allowed value (``Literal``) restricts what is supported; other values are rejected.
    """

    model_config = ConfigDict(strict=True)

    names: ClassVar[Mapping[str, str]] = {
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "patch_size": "patch_size",
        "image_size": "image_size",
        "activation": "hidden_act",
        "layer_norm_eps": "layer_norm_eps",
    }
    """Field of ``TowerSpec`` -> its name in the configuration."""

    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    hidden_act: str = "gelu"
    layer_norm_eps: PositiveFloat = 1e-6

    def spec(self) -> dict[str, Any]:
        """Return the fields of ``TowerSpec`` that they state."""
        return {ours: getattr(self, theirs) for ours, theirs in self.names.items()}


Pool = Callable[[Any, "Tensor", int], "Tensor"]


def from_output(pool: "Callable[[Any, int], Tensor]") -> Pool:
    """Make a pooling from a function of the model's output: (output, first patch token) -> [N, C]."""
    return lambda model, pixels, first: pool(model(pixels), first)


@dataclass(frozen=True)
class Naming:
    """A scheme by which files name the tensors of an architecture.

    Attributes:
        name: Its name, such as ``open_clip`` or ``transformers``.
        layout: Format of a bare file with these names, in words.
        anchor: The key whose prefix is the tower's prefix.
        present: Key prefixes that must be present too, under the tower's prefix.
        table: The table, keys relative to the tower's prefix.
        absent: Keys that must be absent: they belong to another architecture with the same names.
        projection: Key of the projection relative to an *enclosing* prefix, if it is outside the tower.
        optional: Keys that a tower may lack.
        layer_norm_eps: Epsilon of every LayerNorm if no config states it; None for that of the architecture.
        pooling: Pooling of files with these names; None for the default of the architecture.
        activation: Activation of bare files with these names; None if there are several.
    """

    name: str
    layout: str
    anchor: str
    present: tuple[str, ...]
    table: KeyTable
    absent: tuple[str, ...] = ()
    projection: str | None = None
    optional: frozenset[str] = frozenset()
    layer_norm_eps: float | None = None
    pooling: str | None = None
    activation: str | None = None


@dataclass(frozen=True)
class Architecture:
    """An architecture of vision encoders.

    Attributes:
        name: Its name in `TowerSpec.architecture`.
        title: Its name in messages.
        examples: Published towers with this architecture.
        reads: The supported files.
        model_type: ``model_type`` of a config.json that describes such a tower.
        around: ``model_type`` of a config.json that describes one in its ``vision_config``, if there is such a model.
        model_class: The class in transformers.
        options: Arguments of its constructor in addition to the configuration.
        fields: The fields of its config.json.
        settings: ``TowerSpec`` -> entries of config.json other than ``model_type`` and those of ``fields``.
        shapes: ``TowerSpec`` -> shapes of the tensors, by their names in the loaded model.
        unread: ``TowerSpec`` -> shapes, by name in files, of tensors that a host's class has but does not use.
        not_in_hosts: Why no host can have such a tower; empty if some can.
        written: Names in the loaded model -> names in files, where they differ.
        inner: Prefix of the latter in the file of a tower alone or in a host.
        namings: Schemes by which files name the tensors.
        patches: Name of the patch convolution [C, 3, p, p].
        positions: Name of the position table.
        positions_ndim: Its number of dimensions: 2 for [leading + g·g, C], 3 for [1, leading + g·g, C].
        registers: Name of the register tokens [1, registers, C]; None if there are none.
        leading: Rows of the position table before the patches: 1 for a class token.
        antialias: Whether the library resamples the position table with antialias.
        resampled: Whether the library resamples the position table for other image sizes, so that the folder's image
            processor may have another image size than the table.
        position_ids: Whether the model numbers the positions in a buffer that is not stored.
        shares_space: Whether features of the default pooling are in the image-text space without a projection.
        blocks: Attribute of the model that contains its transformer blocks.
        activations: Allowed activations; the first one is the default.
        heads: Width -> attention heads, if no config says otherwise.
        poolings: How image features are computed: name -> (model, pixels, first patch token) -> [N, C]. The first one
            is the default.
        pixels: Default preprocessing.
    """

    name: str
    title: str
    model_type: str
    model_class: str
    fields: type[ConfigFields]
    settings: "Callable[[TowerSpec], dict[str, Any]]"
    shapes: "Callable[[TowerSpec], Shapes]"
    namings: tuple[Naming, ...]
    patches: str
    positions: str
    activations: tuple[str, ...]
    poolings: "Mapping[str, Pool]"
    examples: str
    reads: str
    pixels: Mapping[str, Any]
    blocks: str
    options: Mapping[str, Any] = field(default_factory=dict)
    around: str | None = None
    inner: str = ""
    unread: "Callable[[TowerSpec], Shapes]" = lambda _: {}
    not_in_hosts: str = ""
    written: KeyTable = field(default_factory=lambda: KeyTable({}))
    positions_ndim: int = 2
    registers: str | None = None
    leading: int = 1
    antialias: bool = False
    resampled: bool = False
    position_ids: bool = False
    heads: "Callable[[int], int]" = lambda width: max(1, width // 64)
    shares_space: bool = False

    @property
    def layer_norm_eps(self) -> float:
        """Default epsilon of every LayerNorm."""
        return float(self.fields.model_fields["layer_norm_eps"].default)

    def spec_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of ``TowerSpec`` that the config.json of a tower states, including defaults.

        Raises:
            ValueError: a field has an unsupported value; the message is one line.
        """
        try:
            found = self.fields.model_validate(settings)
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:
                raise ValueError(f"vision_config is {first['input']!r:.60}: expected an object") from None
            raise ValueError(f"field '{first['loc'][0]}' is {first['input']!r}: {first['msg']}") from None
        return {"architecture": self.name, **found.spec()}

    def vision_settings(self, spec: "TowerSpec") -> dict[str, Any]:
        """Return the config.json of a tower."""
        return {
            "model_type": self.model_type,
            **{theirs: getattr(spec, ours) for ours, theirs in self.fields.names.items()},
            "num_channels": CHANNELS,
            **self.settings(spec),
        }

    def written_name(self, name: str) -> str:
        """Return the name of a tensor of the model in files, after `inner` or the host's prefix in its place."""
        found = self.written.find(name)
        return found.targets[0] if found else name
