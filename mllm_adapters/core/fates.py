"""What becomes of a host's connectors and of its processor, as data; `mllm_adapters.core.wording` has the words."""

from typing import Annotated, Literal

from pydantic import Field

from mllm_adapters.checkpoints.data import Data


class Kept(Data):
    """A connector that stays as it is; it reads features of this width."""

    fate: Literal["kept"] = "kept"
    width: int


class Reinitialized(Data):
    """A connector that is drawn at random.

    Attributes:
        before: Width of the features in the source.
        after: Width of the features in the target.
        because: ``width``: that differs; ``latents``: likewise, and so does that of the latents beside the features, so
            that nothing of the module stays; ``patches``: it reads single patches, where it read several side by side.
    """

    fate: Literal["reinitialized"] = "reinitialized"
    before: int
    after: int
    because: Literal["width", "latents", "patches"] = "width"


class Added(Data):
    """A connector that the source does without, drawn at random.

    Attributes:
        before: Width of the features in the source.
        after: Width of the features in the target.
    """

    fate: Literal["added"] = "added"
    before: int
    after: int


class Unneeded(Data):
    """A connector that source and target do without: features and language model have the same width."""

    fate: Literal["unneeded"] = "unneeded"
    width: int


class Taken(Data):
    """A connector that was trained on features of this width, taken from another file of this name."""

    fate: Literal["taken"] = "taken"
    source: str
    width: int


class Fitted(Data):
    """A connector that is fitted on images; how many and how well (R² held out) once that is done."""

    fate: Literal["fitted"] = "fitted"
    images: int | None = None
    r2: float | None = None


class Recorded(Data):
    """A fate as a record of format 2 has it: as a phrase."""

    fate: Literal["recorded"] = "recorded"
    words: str


ConnectorFate = Annotated[
    Kept | Reinitialized | Added | Unneeded | Taken | Fitted | Recorded, Field(discriminator="fate")
]
"""What becomes of a module that reads vision features."""


class ProcessorFate(Data):
    """How the target's processor comes about.

    Attributes:
        name: Class of the processor that is made around the tokenizer; None where the source's own stays, but for the
            pixels.
        tokenizer: Class of the tokenizer, where it is known.
        origin: Where the tokenizer comes from: the ``source``, or the folder of its ``language_model``.
        made_of: Vocabulary file that the tokenizer is converted from, if it is.
        tokenizers: How many there are.
        template: Whether a chat template is added that the source does not have.
    """

    name: str | None = None
    tokenizer: str | None = None
    origin: Literal["source", "language_model"] = "source"
    made_of: str | None = None
    tokenizers: int = 1
    template: bool = False
