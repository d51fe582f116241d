"""Training examples: conversations rendered with the model's chat template, with labels only on the answers.

All text is rendered and counted before training starts; images are opened only when their row is used.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset as Table
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from mgll_encoder.common.chat import PREFIX_TYPES
from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.images import open_image
from mllm_adapters.data.arrow_cache import compute_table
from mllm_adapters.data.chat_template import (
    Example,
    adds_special_tokens,
    check_processor,
    image_tokens,
    render,
)
from mllm_adapters.data.corpus import Corpus
from mllm_adapters.data.fingerprints import text_fingerprint
from mllm_adapters.data.training_rows import RowTable, in_memory, to_conversation

RENDERED_VERSION = 1
"""Part of the cache key of rendered rows: changes when the rendering of a row changes."""

RENDERED = pa.schema(
    [
        ("images", pa.list_(pa.string())),
        ("text", pa.string()),
        ("starts", pa.list_(pa.int32())),
        ("ends", pa.list_(pa.int32())),
        ("length", pa.int32()),
        ("shown", pa.int32()),
        ("damaged", pa.bool_()),
    ]
)
"""Columns of a rendered table: those of `Example`, its length in tokens, the number of its images, and whether one of
them cannot be read (the other columns are then empty)."""

IGNORED = -100
"""Label of positions that carry no loss (PyTorch's default ``ignore_index``)."""

TOKEN_TYPES = "mm_token_type_ids"
"""Token type that some processors return per position: text (0), image, video; Qwen's models need it for positions."""

PER_TOKEN = (TOKEN_TYPES, PREFIX_TYPES)
"""Optional outputs of processors per position, in addition to ids and mask."""


class ExampleTable(Sequence[Example]):
    """Rendered conversations on disk that behave like a list of examples.

    Attributes:
        table: All rows of the corpus, see `RENDERED`.
        kept: Indices of the rows that are trained on.
        key: Hash of the inputs of ``table``; empty if it is not on disk.
    """

    def __init__(self, table: Table, kept: NDArray[np.int64], key: str = "") -> None:
        self.table, self.kept, self.key = table, kept, key

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def text_only(self) -> bool:
        """Whether a training row has no image."""
        return not self.column("shown").all()

    def column(self, name: str) -> NDArray[np.int64]:
        """Return a numeric column of `RENDERED` for the training rows."""
        return np.asarray(self.table.select_columns(name).with_format("numpy")[:][name][self.kept])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return to_example(self.table[int(self.kept[index])])


def to_example(row: Mapping[str, Any]) -> Example:
    """Make the example of a row of `RENDERED`."""
    return Example(tuple(row["images"]), row["text"], tuple(zip(row["starts"], row["ends"], strict=True)))


@dataclass(frozen=True)
class DataCounts:
    """Counts of used and skipped rows: ``rows`` = ``kept`` + all that were left out.

    Attributes:
        rows: All rows.
        images: Readable images of the rows.
        kept: Rows that are trained on.
        text_only: Rows without an image, if the stage trains nothing on them.
        too_long: Rows with more tokens than allowed.
        damaged: Rows with an image that cannot be read.
        other_split: Rows of the validation or test split.
    """

    rows: int
    images: int
    kept: int
    text_only: int
    too_long: int
    damaged: int = 0
    other_split: int = 0


def prepare_examples(
    corpus: Corpus, processor: Any, max_length: int, text_only: bool
) -> tuple[ExampleTable, DataCounts]:
    """Render and count the rows of a corpus; rows rendered before are taken from the cache.

    Args:
        corpus: Checked conversations.
        processor: The model's processor, or None if the model has none.
        max_length: Longest example in tokens, image tokens included; longer ones are left out, never
            truncated.
        text_only: Whether rows without an image are kept.

    Raises:
        UserError: see `check_processor` and `render`; or no row is left.
    """
    check_processor(processor)
    rendered, key = _rendered(corpus, processor)
    columns = rendered.select_columns(["length", "shown", "damaged"]).with_format("numpy")[:]
    usable = ~columns["damaged"]
    wanted = usable & ((columns["shown"] > 0) | text_only)
    short = columns["length"] <= max_length
    kept = np.flatnonzero(wanted & short)
    counts = DataCounts(
        rows=len(rendered) + corpus.other_split,
        images=len(corpus.sizes),
        kept=len(kept),
        text_only=int((usable & ~wanted).sum()),
        too_long=int((wanted & ~short).sum()),
        damaged=int((~usable).sum()),
        other_split=corpus.other_split,
    )
    if not len(kept):
        unreadable = f", {counts.damaged} show images that cannot be read" if counts.damaged else ""
        raise BadDataError(
            f"{corpus.path}: none of {counts.rows} rows can be trained on: {counts.text_only} have no image, "
            f"{counts.too_long} are longer than {max_length} tokens (`max_length`){unreadable}"
        )
    examples = ExampleTable(rendered, kept, key)
    _try_several_images(examples, columns["shown"][kept], corpus, processor)
    return examples, counts


def _rendered(corpus: Corpus, processor: Any) -> tuple[Table, str]:
    """Return all rows of a corpus as `RENDERED`, and the key of the table if it is on disk."""
    work = Renderer(processor, corpus.sizes, frozenset(corpus.damaged))
    if not isinstance(corpus.rows, RowTable):
        return compute_table(in_memory(corpus.rows), work, RENDERED), ""
    looks = sorted((name, *corpus.sizes[name], digest) for name, digest in corpus.digests.items())
    made_of = [RENDERED_VERSION, corpus.rows.key, text_fingerprint(processor), looks, sorted(corpus.damaged)]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    return compute_table(corpus.rows.table, work, RENDERED, key, "Rendering conversations"), key


@dataclass
class Renderer:
    """Renders rows of `mllm_adapters.data.training_rows.SCHEMA` to rows of `RENDERED`, in any process.

    Attributes:
        processor: The model's processor.
        sizes: Image path -> (width, height) in pixels.
        damaged: Images that cannot be read.
        tokens: Cache: size -> tokens of an image of this size.
    """

    processor: Any
    sizes: Mapping[str, tuple[int, int]]
    damaged: frozenset[str]
    tokens: dict[tuple[int, int], int] = field(default_factory=dict)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Map the columns of a batch of rows to columns of the result."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        whole = [self.damaged.isdisjoint(row["images"]) for row in rows]
        found = iter(render([to_conversation(row) for row in compress(rows, whole)], self.processor))
        made = [self._row(row, next(found) if good else None) for row, good in zip(rows, whole, strict=True)]
        return {name: [row[name] for row in made] for name in RENDERED.names}

    def _row(self, row: Mapping[str, Any], rendered: Example | None) -> dict[str, Any]:
        example = rendered or Example((), "", ())
        return {
            "images": row["images"],
            "text": example.text,
            "starts": [start for start, _ in example.answers],
            "ends": [end for _, end in example.answers],
            "length": self._length(rendered) if rendered else 0,
            "shown": len(row["images"]),
            "damaged": rendered is None,
        }

    def _length(self, example: Example) -> int:
        """Count the tokens of an example, image tokens included."""
        special = adds_special_tokens(example.text, self.processor)
        length = len(self.processor.tokenizer(example.text, add_special_tokens=special)["input_ids"])
        for size in (self.sizes[name] for name in example.images):
            if size not in self.tokens:
                self.tokens[size] = image_tokens(size, self.processor)
            length += self.tokens[size] - 1  # the placeholder itself is counted already
        return length


def _try_several_images(
    examples: ExampleTable, shown: NDArray[np.int64], corpus: Corpus, processor: Any
) -> None:
    """Encode the first row with more than one image: not every family supports several, or at any position."""
    several = np.flatnonzero(shown > 1)
    if not len(several):
        return
    example = examples[int(several[0])]
    blanks = [Image.new("RGB", corpus.sizes[name]) for name in example.images]
    try:
        encode_with(example, blanks, processor)
    except ValueError as error:
        names = ", ".join(example.images)
        raise BadDataError(
            f"{corpus.path}: this model does not support a row with the images {names}: {error}"
        ) from None


def encode(example: Example, folder: Path, processor: Any) -> dict[str, Tensor]:
    """Encode one example to tokens, labels and pixels.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` of shape (T,), `PER_TOKEN` if the processor returns
        them, and its image inputs. ``labels`` are the ids of the answers' tokens, and `IGNORED` elsewhere,
        including image positions.

    Raises:
        UserError: an image is missing or damaged.
    """
    return encode_with(example, [open_image(folder / name) for name in example.images], processor)


def encode_with(example: Example, images: Sequence[Image.Image], processor: Any) -> dict[str, Tensor]:
    """Encode one example as `encode` does, with images that are already open."""
    features = processor(
        text=[example.text],
        images=list(images) or None,
        **_instruction(example, processor),
        add_special_tokens=adds_special_tokens(example.text, processor),
        return_offsets_mapping=True,
        return_text_replacement_offsets=True,
        return_tensors="pt",
    )
    offsets = features.pop("offset_mapping")[0]
    replaced = features.pop("text_replacement_offsets")
    placeholders = list(replaced[0]) if len(replaced) else []  # empty if there is no image
    input_ids, mask = features.pop("input_ids")[0], features.pop("attention_mask")[0]
    labels = torch.full_like(input_ids, IGNORED)
    for span in example.answers:
        start, end = (_after_expansion(position, placeholders) for position in span)
        inside = ((offsets[:, 0] < end) & (offsets[:, 1] > start)).nonzero().flatten()
        # All tokens from first to last: some tokenizers give white space inside an answer an empty offset.
        answer = slice(int(inside[0]), int(inside[-1]) + 1)
        labels[answer] = input_ids[answer]
    text = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    text |= {name: features.pop(name)[0] for name in PER_TOKEN if name in features}
    if PREFIX_TYPES in text:  # tokens before the first answer must not attend to it or to later ones
        answered = (labels != IGNORED).nonzero().flatten()
        text[PREFIX_TYPES][int(answered[0]) :] = 1
    return {**text, **features}


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Examples that are encoded on access: images are opened in the data loader's workers and not kept."""

    def __init__(self, examples: Sequence[Example], folder: Path, processor: Any) -> None:
        self.examples, self.folder, self.processor = examples, folder, processor

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return encode(self.examples[index], self.folder, self.processor)


@dataclass(frozen=True)
class Collator:
    """Batches encoded examples: text padded on the right, images concatenated.

    Attributes:
        pad_token_id: Pads ``input_ids``; masked in attention and loss.
    """

    pad_token_id: int

    def __call__(self, batch: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Collate to tensors of shape (B, T) for text and (images of the batch, ...) for images."""
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        fill |= {name: 0 for name in PER_TOKEN if name in batch[0]}
        text = {
            name: pad_sequence([row[name] for row in batch], batch_first=True, padding_value=value)
            for name, value in fill.items()
        }
        of_images = sorted({name for row in batch for name in row} - fill.keys())
        return text | {name: _joined([row[name] for row in batch if name in row]) for name in of_images}


class AnswerCollator(Collator):
    """Batches examples so that logits are computed only at answers: vocabularies are large, answers are short."""

    def __call__(self, batch: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Collate as `Collator`, with ``logits_to_keep`` (positions before answer tokens) and ``shift_labels``."""
        tensors = super().__call__(batch)
        following = tensors["labels"][:, 1:]
        positions = (following != IGNORED).any(dim=0).nonzero().flatten()
        return tensors | {"logits_to_keep": positions, "shift_labels": following[:, positions].contiguous()}


def _instruction(example: Example, processor: Any) -> dict[str, Any]:
    """Return the text before the first answer, for a processor that needs it separately (for a Q-Former)."""
    if not getattr(processor, "takes_instructions", False):
        return {}
    return {"instructions": [example.text[: example.answers[0][0]]]}


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Concatenate values; instructions (n, Q) of different lengths are padded with zeros, which their mask hides."""
    if values[0].ndim == 2 and not values[0].is_floating_point():
        longest = max(value.shape[1] for value in values)
        values = [torch.nn.functional.pad(value, (0, longest - value.shape[1])) for value in values]
    return torch.cat(list(values))


def _after_expansion(position: int, placeholders: Sequence[Mapping[str, Any]]) -> int:
    """Return a character's position after the placeholders before it have been expanded."""
    for placeholder in reversed(placeholders):
        if placeholder["span"][1] <= position:
            return int(position + placeholder["new_span"][1] - placeholder["span"][1])
    return position
