"""Forward passes that compute the common part of all questions on an image once.

There are three strategies; the first that a model supports is used:

* ``prefix``: keys and values of the common prefix (system prompt, image, first words) are computed once per image; the
  rest of each question, with all its rotations in one tree, continues them.
* ``tree``: all questions on an image form one tree and one forward pass.
* ``plain``: prompts in padded batches, without sharing. For models that combine text and image early (a Q-Former with
  the instruction as input) or that do not accept custom masks.

A strategy is first compared with ``plain`` on the first image; if the model gives different numbers, it is not used,
which is logged.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eval_mcq.scoring.packing import (
    CPU_TOKENS,
    TOKENS,
    Part,
    branches,
    common,
    fitting,
    part_of,
    passes,
    pieces,
)
from eval_mcq.scoring.prefix_tree import Tree
from eval_mcq.scoring.requests import Prepared, PromptTokenizer, TokenizedRequest
from mgll_encoder.common.chat import PREFIX_TYPES
from mgll_encoder.common.hooks import hooked

_logger = logging.getLogger(__name__)

Way = Literal["prefix", "tree", "plain"]

Found = list[list[Tensor]]
"""Result of one row: for each continuation and each of its positions, the requested log-probabilities."""

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
"""Maximum difference of log-probabilities from those of the plain strategy, by the model's number format."""

_HALF = (torch.bfloat16, torch.float16)

PLAIN_ROWS = 8
"""Prompts per padded batch if nothing can be shared."""

REFUSALS = (ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError, RuntimeError)
"""Exceptions of models that do not accept a custom mask, cache or positions."""


class Engine:
    """Computes log-probabilities of requested tokens after prompts.

    Args:
        model: A decoder-only transformers image-text model, on its device.
        writer: Builds its inputs.
        dtype: Number format of the model's inputs; log-probabilities are always computed in float32.
        way: The only strategy to use besides ``plain``, or ``auto``.
    """

    def __init__(
        self, model: Any, writer: PromptTokenizer, dtype: torch.dtype, way: Way | Literal["auto"] = "auto"
    ) -> None:
        self.model = model
        self.writer = writer
        self.dtype = dtype
        self.device = next(model.parameters()).device
        self.trusted: dict[Way, bool] = (
            {"plain": True}
            if way == "auto"
            else {known: known in (way, "plain") for known in ("prefix", "tree", "plain")}
        )
        self._tokens = CPU_TOKENS if self.device.type == "cpu" else TOKENS
        self._inner = getattr(model, "model", model)
        text = model.config.get_text_config()
        self._window = getattr(text, "sliding_window", None)
        # A layer has about 12 width² weights, each of which costs one product per token, and attention costs 2 width
        # products per pair of tokens, at about two thirds of the speed.
        self._attention_budget = 4.0 * text.hidden_size

    @torch.no_grad()  # not inference_mode, in which DeepSpeed cannot gather sharded weights
    def run(self, batch: Sequence[Prepared]) -> list[list[Found]]:
        """Compute log-probabilities for every row of every image of a batch."""
        ways = [self._way(prepared) for prepared in batch]
        found: list[list[Found]] = [[] for _ in batch]
        for way in dict.fromkeys(ways):
            chosen = [i for i, of_image in enumerate(ways) if of_image == way]
            for some in _joinable([batch[i] for i in chosen]):
                members = [chosen[i] for i in some]
                for i, of_image in zip(members, self._run(way, [batch[i] for i in members]), strict=True):
                    found[i] = of_image
        return found

    def _run(self, way: Way, batch: Sequence[Prepared]) -> list[list[Found]]:
        if way == "plain":
            return [self._plain(prepared, PLAIN_ROWS) for prepared in batch]
        if way == "tree":
            return self._tree(batch)
        return [found for some in passes(batch, self._tokens) for found in self._prefix(some)]

    def _way(self, prepared: Prepared) -> Way:
        """Return the first strategy that shares something and that the model supports."""
        longest = max(
            (len(row.tokens) + max(map(len, row.continuations)) for row in prepared.rows), default=0
        )
        if not prepared.sharable or (self._window and longest >= self._window):
            return "plain"
        several = (
            len({row.ask.item.id for row in prepared.rows}) > 1 and common(prepared) >= prepared.image_end
        )
        for way in ("prefix", "tree") if several else ("tree",):
            if way not in self.trusted:
                self.trusted[way] = self._agrees(way, prepared)
            if self.trusted[way]:
                return way
        return "plain"

    def _agrees(self, way: Way, prepared: Prepared) -> bool:
        """Return whether a strategy gives the same numbers as the plain one, on the first and last row of an image."""
        ends = [prepared.rows[0], prepared.rows[-1]][: len(prepared.rows)]
        few = Prepared(ends, prepared.images, prepared.inputs, prepared.per_token, prepared.image_end, True)
        try:
            ours = self._run(way, [few])[0]
        except REFUSALS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            _logger.info(
                f"This model cannot share {_SHARED[way]} between questions ({error}): falling back to plain scoring."
            )
            return False
        off = max(
            float((a - b).abs().max())
            for mine, theirs in zip(ours, self._plain(few, 1), strict=True)
            for of_mine, of_theirs in zip(mine, theirs, strict=True)
            for a, b in zip(of_mine, of_theirs, strict=True)
        )
        if off <= TOLERANCE[self.dtype]:
            return True
        _logger.info(
            f"Sharing {_SHARED[way]} between questions changes this model's answers (log-probabilities by {off:.2g}): "
            "falling back to plain scoring."
        )
        return False

    def _tree(self, batch: Sequence[Prepared]) -> list[list[Found]]:
        """Run one forward pass for all images; images with too many questions are processed several times."""
        parts = [
            part_of(source, prepared, 0, some)
            for source, prepared in enumerate(batch)
            for some in pieces(prepared, range(len(prepared.rows)))
        ]
        found: list[list[Found]] = [[[] for _ in prepared.rows] for prepared in batch]
        for some_parts in fitting(parts, 0, self._tokens):
            trees = [part.tree for part in some_parts]
            sources = [batch[part.source] for part in some_parts]
            given = {
                **self._images(sources),
                "input_ids": self._ids(trees, batch),
                "position_ids": self._positions(sources, trees, [0] * len(trees)),
                "attention_mask": self._mask(trees, None, 0),
                "use_cache": False,
            }
            self._read(some_parts, batch, given, found)
        return found

    def _prefix(self, batch: Sequence[Prepared]) -> list[list[Found]]:
        """Run one forward pass for the prefixes of all images, then others for the rest, as trees."""
        lengths = [common(prepared) for prepared in batch]
        chains = [Tree() for _ in batch]
        for chain, prepared, length in zip(chains, batch, lengths, strict=True):
            chain.add(prepared.rows[0].tokens[:length])
        longest = max(lengths)
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        with self._reading(torch.zeros(len(batch), 1, dtype=torch.long)):
            cache = self.model(
                **self._images(batch),
                input_ids=self._ids(chains, batch),
                position_ids=self._positions(batch, chains, [0] * len(batch)),
                attention_mask=mask.long().to(self.device),
                use_cache=True,
            ).past_key_values
        parts = [
            part_of(source, prepared, lengths[source], rows)
            for source, prepared in enumerate(batch)
            for rows in branches(prepared, lengths[source], self._attention_budget)
        ]
        found: list[list[Found]] = [[[] for _ in prepared.rows] for prepared in batch]
        for some in fitting(parts, longest, self._tokens):
            trees, sources = [part.tree for part in some], [part.source for part in some]
            given = {
                "input_ids": self._ids(trees, batch),
                "position_ids": self._positions(
                    [batch[i] for i in sources], trees, [lengths[i] for i in sources]
                ),
                "attention_mask": self._mask(trees, [lengths[i] for i in sources], longest),
                "past_key_values": _repeated(cache, torch.tensor(sources, device=self.device)),
                "use_cache": True,
            }
            self._read(some, batch, given, found)
        return found

    def _read(
        self,
        parts: Sequence[Part],
        batch: Sequence[Prepared],
        given: Mapping[str, Any],
        found: list[list[Found]],
    ) -> None:
        """Run one forward pass, and store the requested log-probabilities in ``found``."""
        needed = [sorted({n for row in part.nodes for of in row for n in of}) for part in parts]
        widest = max(map(len, needed))
        places = torch.tensor([nodes + nodes[-1:] * (widest - len(nodes)) for nodes in needed])
        wanted = wanted_tokens([batch[part.source].rows[number] for part in parts for number in part.rows])
        with self._reading(places, wanted):
            logits = self.model(**given).logits
        for part, nodes, of_part in zip(parts, needed, logits, strict=True):
            of_part = of_part[: len(nodes)].float().log_softmax(dim=-1)
            place = {node: i for i, node in enumerate(nodes)}
            for number, of_row in zip(part.rows, part.nodes, strict=True):
                row = batch[part.source].rows[number]
                found[part.source][number] = [
                    [of_part[place[node], ids].cpu() for node, ids in zip(of, wanted, strict=True)]
                    for of, wanted in zip(of_row, row.wanted, strict=True)
                ]

    def _plain(self, prepared: Prepared, rows: int) -> list[Found]:
        """Score prompts as the processor writes them, ``rows`` at a time; with one at a time it is the reference."""
        return [
            found
            for start in range(0, len(prepared.rows), rows)
            for found in self._padded(prepared.rows[start : start + rows], prepared.images)
        ]

    def _padded(self, rows: Sequence[TokenizedRequest], images: Sequence[Any]) -> list[Found]:
        """Score rows in one padded batch, with one sequence per continuation, each with its images."""
        many = [(row, tail) for row in rows for tail in row.continuations]
        made = self.writer.batch([row.prompt for row, _ in many], [images] * len(many))
        batch = {name: self.moved(value) for name, value in made.items()}
        tails = [tail[:-1] for _, tail in many]
        if any(tails):
            batch = _lengthened(batch, tails)
        positions = torch.arange(batch["input_ids"].shape[1], device=self.device)
        last = torch.where(batch["attention_mask"].bool(), positions, -1).amax(dim=1)
        most = max(map(len, tails)) + 1
        back = torch.tensor(
            [[max(len(tail) - i, 0) for i in range(most)] for tail in tails], device=self.device
        )
        with self._reading(last[:, None] - back, wanted_tokens(rows)):
            logits = self.model(**batch).logits
        lines = iter(logits)
        found: list[Found] = []
        for row in rows:
            of_row = []
            for wanted in row.wanted:
                line = next(lines)[: len(wanted)].float().log_softmax(dim=-1)
                of_row.append([of_place[ids].cpu() for of_place, ids in zip(line, wanted, strict=True)])
            found.append(of_row)
        return found

    @contextmanager
    def _reading(self, places: Tensor, wanted: Tensor | None = None) -> Iterator[None]:
        """Compute logits only at the given positions of each sequence [n, k], within the block.

        Half precision rounds logits to steps of an eighth or more, so that options tie; those of the ``wanted`` tokens
        are therefore computed in float32.
        """
        head = self.model.get_output_embeddings()
        exact: list[Tensor] = []

        def before(_: str, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *rest = given
            index = places.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
            hidden = hidden.gather(1, index)
            if refined:  # here and not after the call, when DeepSpeed has released the weights
                bias = None if head.bias is None else head.bias[wanted].float()
                exact.append(linear(hidden.float(), head.weight[wanted].float(), bias))
            return (hidden, *rest)

        def after(_: str, logits: Tensor) -> Tensor:
            logits = logits.float()
            logits[..., wanted] = exact.pop()
            return logits

        refined = wanted is not None and type(head) is nn.Linear and head.weight.dtype in _HALF
        with hooked({"head": head}, before=before, after=after if refined else None):
            yield

    def _images(self, batch: Sequence[Prepared]) -> dict[str, Tensor]:
        return {
            name: self.moved(torch.cat([prepared.inputs[name] for prepared in batch]))
            for name in batch[0].inputs
        }

    def _ids(self, trees: Sequence[Tree], batch: Sequence[Prepared]) -> Tensor:
        """Return ids, right-padded with a text token, which has no effect."""
        longest, padding = max(map(len, trees)), batch[0].rows[0].tokens[-1]
        rows = [tree.tokens + [padding] * (longest - len(tree)) for tree in trees]
        return torch.tensor(rows, device=self.device)

    def _mask(self, trees: Sequence[Tree], before: Sequence[int] | None, longest: int) -> Tensor:
        """Build the mask [n, 1, nodes, longest + nodes]: each node attends to the prefix, its ancestors and itself."""
        size = max(map(len, trees))
        visible = torch.zeros(len(trees), size, longest + size, dtype=torch.bool)
        for i, tree in enumerate(trees):
            visible[i, :, longest:].fill_diagonal_(True)
            visible[i, : len(tree), longest : longest + len(tree)] = tree.visible()
            if before:
                visible[i, :, : before[i]] = True
        mask = torch.zeros(visible.shape, dtype=self.dtype).masked_fill(~visible, torch.finfo(self.dtype).min)
        return mask[:, None].to(self.device)

    def _positions(self, sources: Sequence[Prepared], trees: Sequence[Tree], starts: Sequence[int]) -> Tensor:
        """Return the positions of all nodes, [n, nodes], or [axes, n, nodes] for a model with several axes."""
        size = max(map(len, trees))
        rows = []
        for prepared, tree, start in zip(sources, trees, starts, strict=True):
            table = self._along(prepared)
            depths = torch.tensor(tree.depths + [0] * (size - len(tree))) + start
            beyond = (depths - (table.shape[1] - 1)).clamp(
                min=0
            )  # text positions increase by one, on every axis
            rows.append(table[:, depths.clamp(max=table.shape[1] - 1)] + beyond)
        positions = torch.stack(rows, dim=1).to(self.device)
        return positions[0] if positions.shape[0] == 1 else positions

    def _along(self, prepared: Prepared) -> Tensor:
        """Return the model's own positions along the first row, [axes, length]."""
        index = getattr(self._inner, "get_rope_index", None)
        length = len(prepared.rows[0].tokens)
        if index is None:
            return torch.arange(length)[None]
        given = {**prepared.inputs, **prepared.per_token}
        known = {name: given[name] for name in inspect.signature(index).parameters if name in given}
        positions: Tensor = index(**known)[0]
        return positions[:, 0].cpu()[:, :length]

    def moved(self, value: Any) -> Any:
        """Move a tensor to the model's device and number format."""
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)


_SHARED: Mapping[Way, str] = {"prefix": "the keys and values of an image", "tree": "a forward pass"}


def wanted_tokens(rows: Sequence[TokenizedRequest]) -> Tensor:
    """Return the ids that any of the rows requests."""
    return torch.tensor(sorted({i for row in rows for of in row.wanted for ids in of for i in ids}))


def _joinable(batch: Sequence[Prepared]) -> list[list[int]]:
    """Group images whose inputs can be concatenated: equal names, and shapes equal except in the first dimension."""
    kinds: dict[Any, list[int]] = {}
    for i, prepared in enumerate(batch):
        kind = tuple((name, value.shape[1:]) for name, value in sorted(prepared.inputs.items()))
        kinds.setdefault(kind, []).append(i)
    return list(kinds.values())


def _repeated(cache: Any, rows: Tensor) -> Any:
    """Return a new cache with the given rows of another."""
    from transformers import DynamicCache

    return DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in cache.layers])


def _lengthened(batch: Mapping[str, Any], tails: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Append tokens to each row of a batch, right-padded."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    lengthened = dict(batch)
    width = max(int(real.sum()) + len(tail) for real, tail in zip(mask, tails, strict=True))
    of_tokens = {
        name: value for name, value in batch.items() if torch.is_tensor(value) and value.shape == ids.shape
    }
    for name, value in of_tokens.items():
        longer = value.new_zeros(len(ids), width)
        for i, (real, tail) in enumerate(zip(mask, tails, strict=True)):
            end = int(real.sum())
            longer[i, :end] = value[i][real]
            if name == "input_ids" and tail:
                longer[i, end : end + len(tail)] = torch.tensor(tail)
            if name == "attention_mask":
                longer[i, : end + len(tail)] = 1
            if name == PREFIX_TYPES:
                longer[i, end : end + len(tail)] = 1
        lengthened[name] = longer
    return lengthened
