"""Training data as a whole: the rows of all files, and facts about their images."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import BadDataError
from mgll_encoder.data.manifest import split_of, warn_if_test
from mllm_adapters.data.dataset_rows import content_digest
from mllm_adapters.data.image_index import image_facts
from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.data.training_rows import DataOptions, built_of, conversations, read_table


@dataclass(frozen=True)
class Corpus:
    """Training data that has passed every check that needs no model.

    Attributes:
        path: The file, or the first of several.
        folder: Folder that relative image paths start from.
        rows: The rows: a list, or a table on disk that behaves like one.
        sizes: Image path -> (width, height) in pixels.
        digests: Image path -> hash of the bytes that decide its pixels (`picture_digest`).
        damaged: Image path -> why the file cannot be read; rows with it are left out.
        files: All files.
        other_split: Number of rows that the files' own splits assign to other uses than training.
        options: How rows were made from files.
    """

    path: Path
    folder: Path
    rows: Sequence[Conversation]
    sizes: Mapping[str, tuple[int, int]]
    digests: Mapping[str, str] = field(default_factory=dict)
    damaged: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    other_split: int = 0
    options: DataOptions = field(default_factory=DataOptions)

    def splits(self) -> list[dict[str, Any]]:
        """Return how each file was split, for those that record it: manifests and benchmarks."""
        return [split for file in self.files or (self.path,) if (split := split_of(built_of(file)))]

    def warn_of_test_files(self) -> None:
        """Warn of the files that record that they are of a test split: benchmarks."""
        for file in self.files or (self.path,):
            warn_if_test(file, built_of(file))

    def digest(self) -> str:
        """Return the SHA-256 of the file, or of the hashes of several files."""
        hashes = [content_digest(file) for file in self.files or (self.path,)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def read_corpus(
    path: Path | Sequence[Path], folder: Path | None = None, options: DataOptions | None = None
) -> Corpus:
    """Read training files, check every row, and decode every image that is not in the cache.

    Args:
        path: One file or several, of any format that `mllm_adapters.data.training_rows` reads.
        folder: Folder that image paths in conversations start from; benchmarks and manifests store their own.
        options: How rows are made from files.

    Raises:
        UserError: see `read_table` and `image_facts`; the image folder is needed but not given; or, with
            ``strict``, an image cannot be read.
    """
    files = (path,) if isinstance(path, Path) else tuple(path)
    options = options or DataOptions()
    rows, other_split = read_table(files, options)
    names = dict.fromkeys(name for images in rows.table.select_columns("images") for name in images["images"])
    if folder is None and (relative := next((name for name in names if not Path(name).is_absolute()), None)):
        raise BadDataError(f"{files[0]} names images without their folder ({relative}): pass it as `images`")
    start = folder or files[0].parent
    facts = image_facts(names, start)
    damaged = {name: fact.fault for name, fact in facts.items() if fact.fault}
    if damaged and options.strict:
        name, fault = next(iter(damaged.items()))
        raise BadDataError(
            f"{len(damaged)} of {len(facts)} images cannot be read as images in {start}, first: {name} ({fault})"
        )
    return Corpus(
        path=files[0],
        folder=start,
        rows=rows,
        sizes={name: (fact.width, fact.height) for name, fact in facts.items() if not fact.fault},
        digests={name: fact.digest for name, fact in facts.items() if not fact.fault},
        damaged=damaged,
        files=files,
        other_split=other_split,
        options=options,
    )


def read_conversations(path: Path) -> list[Conversation]:
    """Read all conversations of a file in LLaVA's format; for large files see `read_corpus`.

    Raises:
        UserError: see `conversations`; or there are no conversations.
    """
    rows = list(conversations(path))
    if not rows:
        raise BadDataError(
            f"{path} holds no conversations: expected a JSON list, or one JSON object per line"
        )
    return rows
