"""Splits by patient: all images of a patient are in the same split, on every machine and in every command."""

import hashlib

from mgll_encoder.common.errors import InvalidArgumentError


def assign_split(patient: str, test: float = 0.3, val: float = 0.0, seed: int = 0) -> str:
    """Return ``"train"``, ``"val"`` or ``"test"`` for a patient (or source image) id.

    The id is hashed to a number in [0, 1), so a patient's split depends only on the id and the seed: adding rows to a
    table moves no patient.

    Args:
        patient: Patient or source id, as written in the label table.
        test: Share of patients for the test split, in [0, 1].
        val: Share of patients for the validation split, in [0, 1].
        seed: A different seed gives a different split.

    Raises:
        UserError: the shares leave nothing for the training split.
    """
    if not (test >= 0 and val >= 0 and test + val < 1):
        raise InvalidArgumentError(
            f"`test_share` is {test} and `val_share` is {val}: expected shares of at least 0 that add up to less than 1"
        )
    digest = hashlib.sha256(f"{seed}:{patient}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < test:
        return "test"
    return "val" if position < test + val else "train"
