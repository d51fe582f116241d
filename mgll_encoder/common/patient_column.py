"""Which column of a label table names the patient: one rule for all commands, so that their splits agree."""

import logging
import re

from mgll_encoder.common.errors import UserError
from mgll_encoder.common.tables import Table

_logger = logging.getLogger(__name__)

NONE = "none"
"""What ``--patient-column`` says of a table in which every image is of another patient."""

KNOWN = frozenset(
    {
        "patient", "patientid", "patientno", "patientnr", "patientnumber", "patientorsourceid", "ptid",
        "subject", "subjectid", "participant", "participantid",
    }
)  # fmt: skip
"""Names that such columns have, in small letters and digits alone: ``Patient ID`` and ``patient_id`` are one."""

HELP = (
    f"Column with the patient or source id; splits never divide a patient. Recognized by names such as patient_id if "
    f"not given; '{NONE}': each image is of another patient."
)
"""Of the option, in every command."""


def patient_column(table: Table, named: str | None, *, drawn: bool) -> str | None:
    """The column that names the patient; what is recognized is said once.

    Args:
        table: The label table.
        named: What ``--patient-column`` says; None where it is not given.
        drawn: Whether sides of a split are drawn, so that it matters who is who.

    Returns:
        The column; None where each image counts as a patient of its own.

    Raises:
        UserError: there is no column of this name, several may be meant, or none is known and sides are drawn.
    """
    if named is not None:
        if named.casefold() == NONE and named not in table.columns:
            return None
        table.check_columns([("--patient-column", named)])
        return named
    known = [column for column in table.columns if re.sub(r"[\W_]", "", column.casefold()) in KNOWN]
    if len(known) == 1:
        _logger.info(
            f"{table.path.name}: patients are told by column '{known[0]}' (--patient-column chooses)"
        )
        return known[0]
    if known:
        raise UserError(
            f"label file {table.path}: columns {', '.join(map(repr, known))} may all name the patient: choose with "
            "--patient-column"
        )
    if drawn:
        raise UserError(
            f"label file {table.path}: no column is known to name the patient, and images of one patient must not be "
            f"on both sides of a split: give --patient-column COLUMN, or --patient-column {NONE} if each image is of "
            f"another patient; its columns are {', '.join(table.columns)}"
        )
    return None
