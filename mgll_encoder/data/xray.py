"""Convert a folder of DICOM radiographs to 8-bit PNGs and a manifest of modality, study and series description.

Headers are read through an allow-list: what the pixels need, three texts, and the names and numbers to remove from
these texts (`dicom.text`). Output files are named by a hash of their pixels; messages number the files.
"""

import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mgll_encoder.common.errors import BadDataError, NotFoundError, UserError
from mgll_encoder.common.files import new_folder, optional_path, regular_file
from mgll_encoder.common.progress import track
from mgll_encoder.common.pseudonyms import Pseudonyms
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.splits import assign_split
from mgll_encoder.common.workers import resilient_map
from mgll_encoder.data.contact_sheet import check_sheet, write_contact_sheet
from mgll_encoder.data.dicom.header import UnusableDicomError, value
from mgll_encoder.data.dicom.pixels import PIXEL_FIELDS, gray_values
from mgll_encoder.data.dicom.text import IDENTITY_FIELDS, TEXT_FIELDS, safe_texts
from mgll_encoder.data.manifest import ManifestHeader, ManifestRow, write_manifest

PLAIN_RADIOGRAPHS = ("CR", "DX")
"""Default modalities: computed and digital radiography, as in MGLL-Xray."""

MANIFEST, PARQUET_MANIFEST = "manifest.jsonl", "manifest.parquet"
IMAGES = "images"

BURNED_IN = "BurnedInAnnotation"
"""Field that is YES if names or dates are part of the picture."""


@dataclass
class XrayReport:
    """Contents of a data set that was written.

    Attributes:
        rows: Images written.
        splits: Images per split.
        texts: Distinct texts per granularity.
        skipped: Skipped files, by reason.
        cut: Descriptions that were shortened or omitted because they may name a person.
        on_sheet: Pictures on the contact sheet.
    """

    rows: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    texts: dict[str, int] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=Skipped)
    cut: int = 0
    on_sheet: int = 0


@dataclass(frozen=True)
class Wanted:
    """Which files to use.

    Attributes:
        modalities: Values of Modality.
        burned_in: Whether to use files with text burned into the picture.
    """

    modalities: tuple[str, ...] = PLAIN_RADIOGRAPHS
    burned_in: bool = False


@dataclass(frozen=True)
class _Outcome:
    """Result of one file: a picture with its texts, or a reason to skip it."""

    number: int
    image: str = ""
    texts: dict[str, list[str]] = field(default_factory=dict)
    cut: int = 0
    reason: str = ""
    advice: str = ""


def build_xray(
    dicom: str | Path,
    out: str | Path,
    *,
    modalities: Sequence[str] = PLAIN_RADIOGRAPHS,
    burned_in: bool = False,
    patient_folders: bool = False,
    manifest: str = MANIFEST,
    test_share: float = 0.3,
    val_share: float = 0.0,
    split_seed: int = 0,
    workers: int = 2,
    contact_sheet: str | Path | None = None,
    strict: bool = False,
    force: bool = False,
) -> XrayReport:
    """Convert DICOM radiographs: write ``images/*.png`` and a manifest, and a contact sheet if requested.

    Args:
        dicom: Folder with DICOM files, at any depth; their names do not matter.
        out: Folder to write.
        modalities: Values of Modality to use.
        burned_in: Use files that declare text burned into the picture.
        patient_folders: Treat each folder directly below ``dicom`` as a patient. Otherwise each file counts as one,
            because patient fields of the header are not used for this.
        manifest: The manifest's name, which determines its format.
        test_share: Share of patients for the test split.
        val_share: Share of patients for the validation split.
        split_seed: Seed of the split.
        workers: Processes that decode.
        contact_sheet: Also write a contact sheet (.png) of pictures as read and as the tower's input.
        strict: Stop at the first file that would be skipped.
        force: Replace existing outputs.

    Raises:
        UserError: there is no such folder, no usable file, an output exists or, if ``strict``, a file is skipped.
    """
    dicom, out, sheet = Path(dicom), Path(out), optional_path(contact_sheet)
    check_sheet(sheet, force)
    if not dicom.is_dir():
        raise NotFoundError(f"DICOM folder {dicom} does not exist or is not a folder: check `dicom`")
    report = XrayReport(skipped=Skipped(strict, "files"))
    files = _files(dicom, report.skipped)
    rows: dict[str, ManifestRow] = {}
    pseudonyms = Pseudonyms(dicom)
    with new_folder(out, force) as folder:
        (folder / IMAGES).mkdir()
        convert = partial(_convert, images=folder / IMAGES, wanted=Wanted(tuple(modalities), burned_in))
        outcomes = resilient_map(convert, list(enumerate(files, start=1)), workers, _lost)
        for outcome in track(outcomes, "Decoding radiographs", len(files)):
            report.skipped.read += 1
            if trouble := outcome.reason or ("same pixels as another file" if outcome.image in rows else ""):
                advice = f"; {outcome.advice}" if outcome.advice else ""
                report.skipped.add(trouble, f"DICOM file {outcome.number} of {len(files)}: {trouble}{advice}")
                continue
            report.cut += outcome.cut
            top = files[outcome.number - 1].relative_to(dicom).parts[0]
            drawn_by = _bare_hash(top) if patient_folders else outcome.image
            rows[outcome.image] = ManifestRow.model_validate(
                {
                    "image": f"{IMAGES}/{outcome.image}.png",
                    "texts": outcome.texts,
                    "patient": pseudonyms.patient(top) if patient_folders else outcome.image,
                    "split": assign_split(drawn_by, test=test_share, val=val_share, seed=split_seed),
                }
            )
        if not rows:
            reasons = "; ".join(report.skipped.lines()) or "it contains no file"
            raise BadDataError(f"DICOM folder {dicom} has no usable image: {reasons}")
        used = {
            level: {text for row in rows.values() for text in row.texts.get(level, [])}
            for level in TEXT_FIELDS
        }
        report.texts = {level: len(texts) for level, texts in used.items() if texts}
        header = ManifestHeader(
            granularities=list(report.texts),
            built={
                "modalities": ",".join(modalities),
                "split_test": test_share,
                "split_val": val_share,
                "split_seed": split_seed,
                **report.skipped.record(),
                "descriptions_cut": report.cut,
            },
        )
        write_manifest(folder / manifest, folder, header, rows.values())
    report.rows = len(rows)
    report.splits.update(row.split for row in rows.values())
    if sheet:
        pictures = [(path.stem[:8], path) for path in sorted((out / IMAGES).iterdir())]
        report.on_sheet = write_contact_sheet(pictures, sheet, force)
    return report


def read_radiograph(path: Path, wanted: Wanted) -> tuple[NDArray[np.uint8], dict[str, list[str]], int]:
    """Decode one DICOM file.

    Args:
        path: The file; a missing preamble or file meta header does not matter.
        wanted: Which files to use.

    Returns:
        Gray values [rows, columns], dense tissue white; the texts per granularity; how many of these were shortened or
        omitted because they may name a person.

    Raises:
        UnusableDicomError: it is not such a radiograph, or cannot be decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of pydicom and its decoders quote the header
        header = _header(path)
        modality = str(value(header, "Modality") or "").strip()
        if modality not in wanted.modalities:
            named = f"modality {modality}" if modality.isalnum() and len(modality) < 5 else "modality missing"
            raise UnusableDicomError(named, f"expected {', '.join(wanted.modalities)}; see `modalities`")
        if not wanted.burned_in and str(value(header, BURNED_IN) or "").strip().upper() == "YES":
            raise UnusableDicomError(
                "burned-in annotation", "names may be part of the picture; `burned_in=True` accepts it"
            )
        gray = gray_values(header)
        return gray, *safe_texts(header)


def _header(path: Path) -> Any:
    from pydicom import dcmread

    try:
        regular_file(path)
    except UserError:
        raise UnusableDicomError("not a file", "it is a pipe, a device or a dangling link") from None
    fields = [*TEXT_FIELDS.values(), *PIXEL_FIELDS, *IDENTITY_FIELDS, BURNED_IN]
    try:
        header = dcmread(path, force=True, specific_tags=fields)
        known = "Modality" in header or "Rows" in header  # with force=True, any other file is parsed as empty
    except PermissionError:
        raise UnusableDicomError("no permission to read it") from None
    except MemoryError:
        raise UnusableDicomError("too large", "not enough memory") from None
    except Exception:  # other files raise errors of any kind
        known = False
    if not known:
        raise UnusableDicomError("not a DICOM file")
    return header


def _files(dicom: Path, skipped: Skipped) -> list[Path]:
    """Return all files below a folder, in the order of ``find | LC_ALL=C sort``."""
    found: list[Path] = []

    def unreadable(_: OSError) -> None:
        skipped.add(
            "folder cannot be opened", f"a folder below {dicom} cannot be opened: check its permissions"
        )

    for folder, _, names in os.walk(dicom, onerror=unreadable):
        found += [Path(folder, name) for name in names]
    return sorted(found, key=os.fsencode)


def _convert(task: tuple[int, Path], images: Path, wanted: Wanted) -> _Outcome:
    number, file = task
    try:
        gray, texts, cut = read_radiograph(file, wanted)
    except UnusableDicomError as error:
        return _Outcome(number, reason=error.reason, advice=error.advice)
    except Exception as error:
        return _Outcome(number, reason=f"cannot be read ({type(error).__name__})")
    name = hashlib.sha256(repr(gray.shape).encode() + gray.tobytes()).hexdigest()[:20]
    stream = io.BytesIO()
    Image.fromarray(gray).save(stream, "PNG")
    (images / f"{name}.png").write_bytes(stream.getvalue())
    return _Outcome(number, name, texts, cut)


def _lost(task: tuple[int, Path]) -> _Outcome:
    return _Outcome(task[0], reason="ended its process", advice="it takes too much memory or time to decode")


def _bare_hash(folder: str) -> str:
    """Return the hash that splits have always used; it can be inverted by guessing, so it is never written."""
    return hashlib.sha256(folder.encode(errors="surrogateescape")).hexdigest()[:12]
