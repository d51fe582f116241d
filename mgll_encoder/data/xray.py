"""From a folder of DICOM radiographs to 8-bit PNGs and a manifest of modality, study and series description.

Headers are read through an allow-list: what the pixels need, and three fields of text. Everything else (names, dates,
numbers, private fields, nested sequences) is never looked at, and file names are replaced by a hash of the pixels.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mgll_encoder.common.cli import track
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.files import new_folder
from mgll_encoder.common.pseudonyms import Pseudonyms
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.splits import assign_split
from mgll_encoder.data.manifest import ManifestHeader, ManifestRow, write_manifest

TEXTS = {"modality": "Modality", "study": "StudyDescription", "series": "SeriesDescription"}
"""Granularity, coarse to fine -> the header field that its text comes from; no other text is read."""

PIXELS = (
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "PlanarConfiguration", "RescaleIntercept", "RescaleSlope",
    "RescaleType", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence",
    "PixelData",
)  # fmt: skip
"""Header fields that the pixels need; nothing of them is written but the picture."""

PLAIN_RADIOGRAPHS = ("CR", "DX")
"""Modalities taken unless told otherwise: computed and digital radiography, as in MGLL-Xray."""

MANIFEST, PARQUET_MANIFEST = "manifest.jsonl", "manifest.parquet"
IMAGES = "images"
_GREY = ("MONOCHROME1", "MONOCHROME2")

# pydicom's InvalidDicomError is not among them: under force=True a missing preamble is no error.
_FOREIGN = (OSError, ValueError, EOFError, NotImplementedError)
"""What pydicom raises on reading the header of what is no DICOM file; such files are counted, not hidden."""

_UNDECODABLE = (AttributeError, ValueError, RuntimeError, NotImplementedError, KeyError)
"""What pydicom raises where pixels are damaged or their decoder is missing; likewise counted."""


@dataclass
class XrayReport:
    """What went into a data set.

    Attributes:
        rows: Images written.
        splits: Images per side of the split.
        texts: Distinct texts per granularity.
        skipped: Files left out, by reason.
    """

    rows: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    texts: dict[str, int] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=Skipped)


@dataclass(frozen=True)
class _Outcome:
    """What became of one file: a picture with its texts, or a reason."""

    file: Path
    image: str = ""
    texts: dict[str, list[str]] = field(default_factory=dict)
    reason: str = ""
    detail: str = ""


class _UnusableError(Exception):
    """A file that is left out.

    Args:
        reason: The kind of trouble.
        advice: What would help.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


def build_xray(
    dicom: Path,
    out: Path,
    *,
    modalities: Sequence[str] = PLAIN_RADIOGRAPHS,
    patient_folders: bool = False,
    manifest: str = MANIFEST,
    test: float = 0.3,
    val: float = 0.0,
    seed: int = 0,
    workers: int = 2,
    strict: bool = False,
    force: bool = False,
) -> XrayReport:
    """Write ``images/*.png`` and the manifest.

    Args:
        dicom: Folder with DICOM files, at any depth; their names do not matter.
        out: Folder to write.
        modalities: Values of Modality to take.
        patient_folders: Each folder directly below ``dicom`` is a patient. Otherwise each file is one, because the
            header fields that would tell are not read.
        manifest: The manifest's name, which decides its format.
        test: Share of patients for the test split.
        val: Share of patients for the validation split.
        seed: Draws the split.
        workers: Processes that decode.
        strict: Stop at the first file that would be left out.
        force: Replace ``out``.

    Raises:
        UserError: no such folder, no file that can be used, ``out`` exists or, if ``strict``, a file is left out.
    """
    if not dicom.is_dir():
        raise UserError(f"DICOM folder {dicom} does not exist or is not a folder: check --dicom")
    files = sorted(path for path in dicom.rglob("*") if path.is_file())
    report = XrayReport(skipped=Skipped(strict, "files"))
    rows: dict[str, ManifestRow] = {}
    pseudonyms = Pseudonyms(dicom)
    with new_folder(out, force) as folder:
        (folder / IMAGES).mkdir()
        for outcome in _converted(files, folder / IMAGES, tuple(modalities), workers):
            report.skipped.read += 1
            if outcome.reason:
                report.skipped.add(outcome.reason, outcome.detail)
            elif outcome.image in rows:
                report.skipped.add(
                    "same pixels as another file", f"{outcome.file}: its picture is there already"
                )
            else:
                top = outcome.file.relative_to(dicom).parts[0]
                drawn_by = _bare_hash(top) if patient_folders else outcome.image
                rows[outcome.image] = ManifestRow.model_validate(
                    {
                        "image": f"{IMAGES}/{outcome.image}.png",
                        "texts": outcome.texts,
                        "patient": pseudonyms.patient(top) if patient_folders else outcome.image,
                        "split": assign_split(drawn_by, test=test, val=val, seed=seed),
                    }
                )
        if not rows:
            reasons = "; ".join(report.skipped.lines()) or "it holds no file"
            raise UserError(f"DICOM folder {dicom} gives no image to train on: {reasons}")
        used = {
            level: {text for row in rows.values() for text in row.texts.get(level, [])} for level in TEXTS
        }
        report.texts = {level: len(texts) for level, texts in used.items() if texts}
        header = ManifestHeader(
            granularities=list(report.texts),
            built={
                "modalities": ",".join(modalities),
                "split_test": test,
                "split_val": val,
                "split_seed": seed,
                **report.skipped.record(),
            },
        )
        write_manifest(folder / manifest, folder, header, rows.values())
    report.rows = len(rows)
    report.splits.update(row.split for row in rows.values())
    return report


def read_radiograph(path: Path, modalities: Sequence[str]) -> tuple[NDArray[np.uint8], dict[str, list[str]]]:
    """Decode one DICOM file.

    Rescaled, windowed (VOI LUT, or the first window; the range of its values without either) and, for MONOCHROME1,
    inverted, so that dense tissue is white.

    Args:
        path: The file; a missing preamble or file meta header does not matter.
        modalities: Values of Modality that are wanted.

    Returns:
        Grey values [rows, columns], and the texts per granularity.

    Raises:
        _UnusableError: it is no greyscale radiograph of these modalities, or cannot be decoded.
    """
    from pydicom import dcmread

    try:
        header: Any = dcmread(path, force=True, specific_tags=[*TEXTS.values(), *PIXELS])
    except _FOREIGN:
        raise _UnusableError("not a DICOM file") from None
    # A file without a header parses as nothing under force=True.
    if "Modality" not in header and "Rows" not in header:
        raise _UnusableError("not a DICOM file")
    modality = str(header.get("Modality", "")).strip()
    if modality not in modalities:
        raise _UnusableError(
            f"modality {modality or 'missing'}", f"wanted is {', '.join(modalities)}: see --modalities"
        )
    if "PixelData" not in header:
        raise _UnusableError("no pixel data")
    if header.get("PhotometricInterpretation") not in _GREY:
        raise _UnusableError("not a greyscale image")
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise _UnusableError("several frames")
    texts = {level: " ".join(str(header.get(name) or "").split()) for level, name in TEXTS.items()}
    return _eight_bits(header), {level: [text] for level, text in texts.items() if text}


def _eight_bits(header: Any) -> NDArray[np.uint8]:
    from pydicom.filewriter import ImplicitVRLittleEndian
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
    from pydicom.uid import ExplicitVRLittleEndian

    if "TransferSyntaxUID" not in header.file_meta:
        implicit, _ = header.original_encoding
        header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    try:
        values = apply_modality_lut(pixel_array(header), header)
        shown = apply_voi_lut(values, header).astype(np.float64)
        low, high = _range(values, shown, header)
    except _UNDECODABLE as error:
        kind = header.file_meta.TransferSyntaxUID.name
        raise _UnusableError(
            f"pixels cannot be decoded ({kind})",
            f"{str(error).splitlines()[0][:120]}; pip install 'mgll-mllm[dicom]' brings decoders",
        ) from None
    grey = np.clip((shown - low) / max(high - low, 1e-9), 0, 1)
    if header.PhotometricInterpretation == "MONOCHROME1":
        grey = 1 - grey
    return np.round(grey * 255).astype(np.uint8)


def _range(values: NDArray[Any], shown: NDArray[np.float64], header: Any) -> tuple[float, float]:
    """What becomes black and white: the ends of the window or table, of the values where there is neither."""
    from pydicom.pixels import apply_voi_lut

    if "WindowCenter" not in header and "VOILUTSequence" not in header:
        return float(values.min()), float(values.max())
    ends = apply_voi_lut(np.array([[np.iinfo(np.int32).min, np.iinfo(np.int32).max]]), header)
    low, high = float(ends.min()), float(ends.max())
    return (low, high) if high > low else (float(shown.min()), float(shown.max()))


def _converted(
    files: Sequence[Path], images: Path, modalities: tuple[str, ...], workers: int
) -> Iterator[_Outcome]:
    convert = partial(_convert, images=images, modalities=modalities)
    if workers < 2:
        yield from track(map(convert, files), "Decoding radiographs", len(files))
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from track(pool.map(convert, files, chunksize=16), "Decoding radiographs", len(files))


def _convert(file: Path, images: Path, modalities: tuple[str, ...]) -> _Outcome:
    try:
        grey, texts = read_radiograph(file, modalities)
    except _UnusableError as error:
        advice = f"; {error.advice}" if error.advice else ""
        return _Outcome(file, reason=error.reason, detail=f"DICOM file {file}: {error.reason}{advice}")
    name = hashlib.sha256(repr(grey.shape).encode() + grey.tobytes()).hexdigest()[:20]
    Image.fromarray(grey).save(images / f"{name}.png")
    return _Outcome(file, name, texts)


def _bare_hash(folder: str) -> str:
    """What splits have always been drawn by; it can be undone by guessing, so it is never written."""
    return hashlib.sha256(folder.encode(errors="surrogateescape")).hexdigest()[:12]
