"""The fates of a host's connectors and its processor, as data; `mllm_adapters.core.wording` words them."""

from typing import Annotated, Literal

from pydantic import Field

from mllm_adapters.checkpoints.data import Data


class Kept(Data):
    """A connector that is kept, and reads features of this width."""

    fate: Literal["kept"] = "kept"
    width: int


class Reinitialized(Data):
    """A connector that is re-initialized.

    Attributes:
        before: Width of the features in the source.
        after: Width of the features in the target.
        because: ``width``: the width differs; ``latents``: likewise, and so does that of the latents, so
            that nothing of the module is kept; ``patches``: it reads single patches instead of several
            concatenated ones.
    """

    fate: Literal["reinitialized"] = "reinitialized"
    before: int
    after: int
    because: Literal["width", "latents", "patches"] = "width"


class Added(Data):
    """A randomly initialized connector that the source does not have.

    Attributes:
        before: Width of the features in the source.
        after: Width of the features in the target.
    """

    fate: Literal["added"] = "added"
    before: int
    after: int


class Unneeded(Data):
    """No connector in source and target, because features and language model have the same width."""

    fate: Literal["unneeded"] = "unneeded"
    width: int


class Taken(Data):
    """A connector trained on features of this width, taken from the file of this name."""

    fate: Literal["taken"] = "taken"
    source: str
    width: int


class Fitted(Data):
    """A connector that is fitted on images; their number and the held-out R² once that is done."""

    fate: Literal["fitted"] = "fitted"
    images: int | None = None
    r2: float | None = None


ConnectorFate = Annotated[
    Kept | Reinitialized | Added | Unneeded | Taken | Fitted, Field(discriminator="fate")
]
"""The fate of a module that reads vision features."""


class ProcessorFate(Data):
    """How the target's processor is made.

    Attributes:
        name: Class of a new processor around the tokenizer; None if the source's own is kept, except for its
            pixel rule.
        tokenizer: Class of the tokenizer, if known.
        origin: Origin of the tokenizer: the ``source``, or the folder of its ``language_model``.
        made_of: Vocabulary file that the tokenizer is converted from, if any.
        tokenizers: Number of tokenizers.
        template: Whether a chat template is added that the source does not have.
    """

    name: str | None = None
    tokenizer: str | None = None
    origin: Literal["source", "language_model"] = "source"
    made_of: str | None = None
    tokenizers: int = 1
    template: bool = False
