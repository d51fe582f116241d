"""The work folder of a run: where it lies, whose it is, and the newest checkpoint in it."""

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mgll_encoder.common.errors import UserError
from mgll_encoder.common.files import check_free, write_text
from mgll_encoder.common.locks import locked

RUN = "run.json"
"""What identifies a run, in its work folder."""

STATE = "trainer_state.json"
"""What the Trainer writes last into a checkpoint: a folder without it is not complete."""


def work_folder(out: Path) -> Path:
    """Where the Trainer checkpoints and logs of an output folder go."""
    return out.with_name(f"{out.name}.training")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete Trainer checkpoint in a folder, or None."""
    complete = [state.parent for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STATE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def check_output(out: Path, *, resume: bool, force: bool) -> None:
    """See to it that a run may write to ``out``; nothing is written or removed.

    Raises:
        UserError: ``out`` exists, an interrupted run is in the way, or there is none to resume.
    """
    check_free(out, force)
    work = work_folder(out)
    saved = last_checkpoint(work)
    if resume and saved is None:
        raise UserError(f"{work} holds no checkpoint to resume from: start without --resume")
    if saved and not (resume or force):
        raise UserError(
            f"{work} holds {saved.name} of an earlier run: go on with --resume, or start anew with --force"
        )


def only_run(out: Path) -> AbstractContextManager[bool]:
    """Hold the only right to train into ``out``; a killed process gives it up.

    Raises:
        UserError: another process has it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_name(f".{out.name}.training.lock")
    return locked(
        file, f"another run is training into {out} ({file} is locked): wait for it, or choose another --out"
    )


def claim(work: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Make the work folder this run's own.

    Raises:
        UserError: the run to resume is another one.
    """
    note = work / RUN
    if resume:
        began_with = json.loads(note.read_text(encoding="utf-8"))
        for field, value in identity.items():
            if began_with.get(field) != value:
                raise UserError(
                    f"{work} is of another run: its {field} is {began_with.get(field)}, now it is {value}: "
                    "repeat the first command with --resume, or start anew with --force"
                )
        return
    if note.is_file():
        shutil.rmtree(work)
    write_text(note, json.dumps(identity, indent=2))
