"""The column of a label table that identifies the patient: one rule for all commands, so that their splits agree."""

import logging
import re

from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.tables import Table

_logger = logging.getLogger(__name__)

NONE = "none"
"""Value of ``--patient-column`` for a table in which every image is from a different patient."""

KNOWN = frozenset(
    {
        "patient", "patientid", "patientno", "patientnr", "patientnumber", "patientorsourceid", "ptid",
        "subject", "subjectid", "participant", "participantid",
    }
)  # fmt: skip
"""Names of such columns, reduced to lowercase letters and digits: ``Patient ID`` and ``patient_id`` are equal."""

HELP = (
    f"Column with the patient or source id; splits are by patient. Detected from names such as patient_id if not "
    f"given; '{NONE}': each image is from a different patient."
)
"""Help text of the option, in every command."""


def patient_column(table: Table, named: str | None, *, drawn: bool) -> str | None:
    """Find the column that identifies the patient; a detected column is logged once.

    Args:
        table: The label table.
        named: The value of ``--patient-column``; None if it is not given.
        drawn: Whether images are assigned to splits, so that the patients must be known.

    Returns:
        The column; None if each image counts as a separate patient.

    Raises:
        UserError: there is no such column, several columns may be meant, or none was detected and ``drawn`` is set.
    """
    if named is not None:
        if named.casefold() == NONE and named not in table.columns:
            return None
        table.check_columns([("`patient_column`", named)])
        return named
    known = [column for column in table.columns if re.sub(r"[\W_]", "", column.casefold()) in KNOWN]
    if len(known) == 1:
        _logger.info(
            f"{table.path.name}: patients are identified by column '{known[0]}' (`patient_column` chooses)"
        )
        return known[0]
    if known:
        raise InvalidArgumentError(
            f"label file {table.path}: columns {', '.join(map(repr, known))} may all identify the patient: choose with "
            "`patient_column`"
        )
    if drawn:
        raise InvalidArgumentError(
            f"label file {table.path}: no column is known to identify the patient, and images of one patient must not "
            f"be in different splits: give `patient_column=COLUMN`, or `patient_column={NONE}` if each image is from a "
            f"different patient; its columns are {', '.join(table.columns)}"
        )
    return None
