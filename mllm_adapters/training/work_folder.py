"""The work folder of a run: its path, its run, and the newest checkpoint in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import MismatchError, NotFoundError
from mgll_encoder.common.files import check_free, write_text
from mgll_encoder.common.resuming import clear_unfinished, forget, last_checkpoint
from mgll_encoder.common.texts import read_json

RUN = "run.json"
"""File in the work folder that identifies its run."""


def work_folder(out: Path) -> Path:
    """Return the folder for the Trainer checkpoints and logs of an output."""
    return out.with_name(f"{out.name}.training")


def check_work_folder(out: Path, *, resume: bool, force: bool) -> None:
    """Check that a run may write to ``out``; nothing is written or removed.

    Raises:
        UserError: ``out`` exists, there is an interrupted run, or there is none to resume.
    """
    check_free(out, force)
    work = work_folder(out)
    saved = last_checkpoint(work)
    if resume and saved is None:
        raise NotFoundError(f"{work} has no checkpoint to resume from: start without `resume`")
    if saved and not (resume or force):
        raise MismatchError(
            f"{work} has {saved.name} of an earlier run: continue with `resume=True`, or start over with "
            "`force=True`"
        )


def claim(work: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Claim the work folder for this run.

    Raises:
        UserError: the run to resume is another one.
    """
    note = work / RUN
    if resume:
        began_with = read_json(note)
        for field, value in identity.items():
            if began_with.get(field) != value:
                raise MismatchError(
                    f"{work} belongs to another run: its {field} was {began_with.get(field)}, now it is "
                    f"{value}: repeat the first command with `resume=True`, or start over with `force=True`"
                )
        clear_unfinished(work)
        return
    forget(work, RUN)
    write_text(note, json.dumps(identity, indent=2))
