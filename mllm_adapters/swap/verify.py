"""Compares a swapped checkpoint with its record, its encoder and its source, at any time after the swap."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mgll_encoder.common.chat import render_chat, template_of
from mgll_encoder.common.devices import AUTO, find_device
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.hub import at_hand
from mgll_encoder.common.library_errors import library_reason
from mgll_encoder.common.texts import read_json
from mgll_encoder.text.pretrained import library_errors
from mgll_encoder.weights.spans import Span, spans
from mgll_encoder.weights.weight_file import is_safetensors
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.checkpoints.fingerprint import agrees, span_hash
from mllm_adapters.core.planning import differences
from mllm_adapters.core.provenance import TensorRecord, find_input, is_input, read_record
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.core.streaming import raw_bytes
from mllm_adapters.core.values import FittedTower
from mllm_adapters.loading.load import check_complete, load_mllm
from mllm_adapters.swap.writer import CONFIG

QUESTION = "What does this image show?"

_SIDE = 64
_BLOCK = 16 << 20


@dataclass(frozen=True)
class Check:
    """One line of the result.

    Attributes:
        name: What was checked.
        passed: Whether it passed; None if it was not checked.
        detail: What was compared, or what is wrong.
    """

    name: str
    passed: bool | None
    detail: str


class Verification:
    """The checks of one folder.

    Args:
        folder: Checkpoint written by ``swap-encoder``.
        encoder: The new tower; searched for by name and hash if not given.
        source: The original checkpoint; likewise.
        device: Device of the model, see `mgll_encoder.common.devices.find_device`.

    Raises:
        UserError: the folder has no record, or a given path cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        encoder: Path | None = None,
        source: Path | None = None,
        device: str = AUTO,
    ) -> None:
        self.folder = folder
        self._device = device
        self.record = read_record(folder)
        inputs = self.record.inputs
        self._encoder = (
            at_hand(encoder) if encoder else (find_input(inputs.tower, folder) if inputs.tower else None)
        )
        self._source = source or find_input(inputs.source, folder)
        self._checkpoint = Checkpoint(folder)

    def checks(self, *, quick: bool = False) -> Iterator[Check]:
        """Yield all checks.

        Args:
            quick: Skip those that load the model.
        """
        files = self._files()
        yield files
        tensors = self._tensors()
        yield tensors
        if tensors.passed:
            yield self._tower()
            yield self._untouched()
        else:
            yield from (Check(name, None, "its tensors are missing") for name in ("tower", "plan"))
        yield from self._loading(quick)

    def tower(self) -> Check:
        """Check that each tensor of the tower equals the encoder's or, if that is not found, has the recorded hash."""
        tensors = self._tensors()
        return self._tower() if tensors.passed else Check("tower", False, tensors.detail)

    def _files(self) -> Check:
        wrong = []
        for name, recorded in self.record.files.items():
            file = self.folder / name
            if not file.is_file():
                wrong.append(f"{name} is missing")
            elif not agrees(recorded, file):
                wrong.append(f"{name} has been changed")
        return _result("files", wrong, f"{len(self.record.files)} as they were written (hashes, samples)")

    def _tensors(self) -> Check:
        try:
            found = self._checkpoint.tensors
        except UserError as error:
            return Check("tensors", False, str(error))
        return _result(
            "tensors",
            [
                f"{n} is {is_}, planned was {planned}"
                for n, is_, planned in differences(found, self.record.tensors)
            ],
            f"{len(self.record.tensors)} with the names, shapes and dtypes of the plan",
        )

    def _tower(self) -> Check:
        steps = [t for t in self.record.tensors if t.kind.from_tower and t.name not in self.record.trained]
        named = self.record.inputs.tower
        if named is None or not steps:
            return Check("tower", None, "the source's own: the encoder was not swapped")
        if self._encoder is None:
            return _result(
                "tower",
                self._changed(steps),
                f"{len(steps)} tensors by their hashes; {named.name} was not found, so they were not "
                "recomputed from it: pass `encoder`",
            )
        plan = self.record.plan_with(self._checkpoint.config, source=self.folder, tower=self._encoder)
        tower = FittedTower(plan)
        wrong = []
        for step in steps:
            expected = tower.read(step.sources[0]).to(getattr(torch, step.dtype))
            if tuple(expected.shape) != step.shape:
                wrong.append(
                    f"{step.name} has shape {list(step.shape)}, the encoder gives {list(expected.shape)}"
                )
            elif sha256(raw_bytes(expected)).hexdigest() != span_hash(self._spans[step.name]):
                wrong.append(f"{step.name} differs from the encoder {self._encoder.name}")
        same = is_input(named, self._encoder)
        which = "the file recorded at the swap" if same else "not the file recorded at the swap, by its hash"
        return _result(
            "tower",
            wrong,
            f"{len(steps)} tensors recomputed from {self._encoder.name} ({which}), bit for bit",
        )

    def _untouched(self) -> Check:
        trained = [t for t in self.record.tensors if t.name in self.record.trained]
        made = [t for t in self.record.tensors if t.sha256 and t not in trained and not t.kind.from_tower]
        wrong = self._changed([*made, *trained])
        taken = [t for t in self.record.tensors if not t.sha256 and t not in trained]
        said = [f"{len(made)} computed tensors by their hashes"] if made else []
        said += [f"{len(trained)} trained after the swap, by the hashes recorded then"] if trained else []
        if self._source is None:
            name = self.record.inputs.source.name
            said.append(
                f"{len(taken)} copied, by samples of their files only: {name} was not found, pass `mllm`"
            )
            return _result("plan", wrong, "; ".join(said))
        original, _, _ = open_checkpoint(self._source)
        shared = compared = 0
        held: dict[Path, dict[str, Span]] = {}
        for step in taken:
            mine = self._spans[step.name]
            header = original.tensors.get(step.sources[0])
            if header is None:
                continue
            if header.file.samefile(mine.file):
                shared += 1
                continue
            if header.file not in held:
                held[header.file] = spans(header.file) if is_safetensors(header.file) else {}
            if header.name not in held[header.file]:
                continue
            compared += 1
            if not _equal(mine, held[header.file][header.name]):
                wrong.append(f"{step.name} differs from {self._source.name}")
        said += [f"{compared} compared byte by byte with {self._source.name}"] if compared else []
        said += [f"{shared} in files shared with it (samples agree)"] if shared else []
        rest = len(taken) - shared - compared
        said += [f"{rest} from parts next to it, by samples"] if rest else []
        return _result("plan", wrong, "; ".join(said))

    def _loading(self, quick: bool) -> Iterator[Check]:
        if quick:
            try:
                check_complete(self.record.plan_with(read_json(self.folder / CONFIG), source=self.folder))
                yield Check("loading", True, "the report is empty (headers only: `quick=True`)")
            except UserError as error:
                yield Check("loading", False, str(error))
            yield Check("image", None, "not looked at: `quick=True` loads no model")
            return
        try:
            model, processor = load_mllm(self.folder)
        except UserError as error:
            yield Check("loading", False, str(error))
            yield Check("image", None, "the model does not load")
            return
        yield Check("loading", True, "no tensor is missing, unexpected or of another shape")
        if processor is None:
            yield Check("image", None, "there is no tokenizer, so the model cannot be run on an image")
            return
        try:
            changed = blanking_changes(model.to(find_device(self._device)), processor)
        except library_errors() as error:
            yield Check("image", False, f"the model cannot be run on an image: {library_reason(error)}")
            return
        detail = f"blanking the image changes the logits of the next token by up to {changed:.3g}"
        yield Check(
            "image",
            changed > 0,
            detail if changed else "blanking the image changes nothing: the output does not depend on it",
        )

    def _changed(self, steps: list[TensorRecord]) -> list[str]:
        """Return the faults of tensors that must still have the recorded hashes."""
        expected = {step.name: self.record.trained.get(step.name, step.sha256) for step in steps}
        return [
            f"{name} has been changed"
            for name, hash_ in expected.items()
            if span_hash(self._spans[name]) != hash_
        ]

    @cached_property
    def _spans(self) -> Mapping[str, Span]:
        return {name: span for file in self._checkpoint.files for name, span in spans(file).items()}


@torch.no_grad()
def blanking_changes(model: Any, processor: Any) -> float:
    """Return the maximum change of the next token's logits when an image is replaced by a blank one."""
    gradient = Image.linear_gradient("L").resize((_SIDE, _SIDE))
    picture = Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180)))
    blank = Image.new("RGB", (_SIDE, _SIDE), (128, 128, 128))
    seen, unseen = (_logits(model, processor, image) for image in (picture, blank))
    return float((seen - unseen).abs().max())


def _logits(model: Any, processor: Any, image: Image.Image) -> torch.Tensor:
    text = f"{processor.image_token}\n{QUESTION}"
    if template_of(processor):
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        text = render_chat(processor, [{"role": "user", "content": content}], add_generation_prompt=True)
    batch = dict(processor(text=[text], images=[image], return_tensors="pt").to(model.device))
    for name, value in batch.items():
        if value.is_floating_point():
            batch[name] = value.to(model.dtype)
    text_config = model.config.get_text_config()
    if text_config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.tensor([[text_config.decoder_start_token_id]], device=model.device)
    logits: torch.Tensor = model(**batch).logits
    return logits[0, -1].float()


def _result(name: str, wrong: list[str], detail: str) -> Check:
    if not wrong:
        return Check(name, True, detail)
    more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
    return Check(name, False, "; ".join(wrong[:3]) + more)


def _equal(one: Span, other: Span) -> bool:
    if one.length != other.length:
        return False
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        left = one.length
        while left:
            size = min(left, _BLOCK)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True
