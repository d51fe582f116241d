"""Somebody has a folder of DICOM radiographs and wants to train on them, without a word about their patients."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.datadict import DicomDictionary, keyword_dict
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import MPEG2MPML, ExplicitVRLittleEndian, RLELossless, generate_uid

from mgll_encoder.cli import main
from mgll_encoder.data.manifest import read_header, read_rows
from mgll_encoder.data.xray import PIXELS, TEXTS, build_xray, read_radiograph
from tests.builders import invoke, refused

SECRET = "Zyx"
"""Planted in every field that must not be read; letters that occur in no other value."""

TEXTUAL = {
    "AE": SECRET, "CS": SECRET.upper(), "LO": f"{SECRET} Smith", "LT": f"{SECRET} Smith", "PN": f"{SECRET}^Smith",
    "SH": SECRET, "ST": SECRET, "UC": SECRET, "UT": SECRET, "UR": f"http://{SECRET}", "DA": "19570314", "TM": "031415",
    "DT": "19570314031415", "AS": "067Y",
}  # fmt: skip
PLANTED = (SECRET.casefold(), "smith", "19570314", "031415", "067y")


def radiograph(
    path: Path, pixels: np.ndarray, *, bits: int = 12, photometric: str = "MONOCHROME2", **fields: object
) -> Path:
    """Write a DICOM file of 16-bit allocated pixels."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", generate_uid()
    header.Modality, header.StudyDescription, header.SeriesDescription = "CR", "XR CHEST 2 VIEWS", "PA"
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, photometric
    header.Rows, header.Columns = pixels.shape
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = (
        16,
        bits,
        bits - 1,
        0,
    )
    header.PixelData = pixels.astype("<u2").tobytes()
    for name, value in fields.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dcmwrite(path, header, enforce_file_format=True)
    return path


def ramp(high: int = 4095) -> np.ndarray:
    """Values from 0 to ``high`` in rows of 16."""
    return np.linspace(0, high, 256).reshape(16, 16).round().astype(np.uint16)


def grey(path: Path) -> np.ndarray:
    return read_radiograph(path, ["CR"])[0]


def plant(header: Dataset) -> int:
    """Write the secret into every field of text or date that the dictionary knows and that must not be read."""
    allowed = {*TEXTS.values(), *PIXELS, "SpecificCharacterSet"}  # the last says how text is encoded
    count = 0
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        groups_of_a_file = tag >> 16 not in (0x0000, 0x0002, 0x0004)
        if groups_of_a_file and vr in TEXTUAL and keyword and not retired and keyword not in allowed:
            setattr(header, keyword, TEXTUAL[vr])
            count += 1
    return count


def test_no_other_header_field_ever_leaves_the_file(tmp_path: Path) -> None:
    """PHI in every other text element, in nested sequences, in private tags and in the names of file and folder."""
    header = Dataset()
    assert plant(header) > 1000
    inner = Dataset()
    plant(inner)
    outer = Dataset()
    outer.RequestAttributesSequence = Sequence([inner])
    header.RequestAttributesSequence = Sequence([inner])
    header.OtherPatientIDsSequence = Sequence([outer])
    block = header.private_block(0x0011, f"{SECRET} VENDOR", create=True)
    block.add_new(0x01, "LO", f"{SECRET} Smith")
    source = radiograph(tmp_path / "in" / f"{SECRET}_Smith" / f"{SECRET}.dcm", ramp())
    whole = dcmread(source)
    whole.update(header)
    dcmwrite(source, whole)
    assert SECRET.encode() in source.read_bytes()

    done = invoke(
        main, "data", "xray", "--dicom", tmp_path / "in", "--out", tmp_path / "out", "--patient-folders"
    )
    assert done.code == 0, done.err
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) == 2
    for path in written:
        searched = path.name.encode().lower() + path.read_bytes().lower()
        assert path.suffix != ".png" or not Image.open(path).info
        assert not [secret for secret in PLANTED if secret.encode() in searched], path
    said = (done.out + done.err).casefold()
    assert not [secret for secret in PLANTED if secret in said]
    row = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[1])
    assert row["texts"] == {"modality": ["CR"], "study": ["XR CHEST 2 VIEWS"], "series": ["PA"]}


def test_the_allow_list_holds_three_texts_and_no_identity() -> None:
    assert list(TEXTS.values()) == ["Modality", "StudyDescription", "SeriesDescription"]
    vrs = {name: DicomDictionary[keyword_dict[name]][0] for name in PIXELS}
    assert {name for name, vr in vrs.items() if vr in TEXTUAL} == {
        "PhotometricInterpretation", "RescaleType", "VOILUTFunction",
    }  # fmt: skip


def test_the_whole_range_becomes_eight_bits(tmp_path: Path) -> None:
    found = grey(radiograph(tmp_path / "a.dcm", ramp()))
    np.testing.assert_array_equal(found, np.round(ramp() / 4095 * 255))


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    found = grey(radiograph(tmp_path / "a.dcm", ramp(), photometric="MONOCHROME1"))
    assert (found[0, 0], found[-1, -1]) == (255, 0)


def test_a_window_decides_what_is_black_and_white(tmp_path: Path) -> None:
    found = grey(radiograph(tmp_path / "a.dcm", ramp(), WindowCenter=2048, WindowWidth=1024))
    # DICOM PS3.3 C.11.2.1.2: linear between c - 0.5 - (w-1)/2 and c - 0.5 + (w-1)/2
    expected = np.clip((ramp() - 2047.5) / 1023 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(found, expected, atol=0.51)
    wide = grey(radiograph(tmp_path / "b.dcm", ramp(1000), WindowCenter=2048, WindowWidth=4096))
    assert wide.max() < 70, "a window wider than the values is kept, not stretched"


def test_rescale_comes_before_the_window(tmp_path: Path) -> None:
    fields = {"RescaleSlope": 2, "RescaleIntercept": -100, "RescaleType": "US"}
    found = grey(radiograph(tmp_path / "a.dcm", ramp(), WindowCenter=4000, WindowWidth=2000, **fields))
    expected = np.clip((ramp() * 2.0 - 100 - 3999.5) / 1999 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_a_lookup_table_is_applied(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor = [16, 0, 8]
    table.add_new("LUTData", "US", list(range(0, 256, 17))[::-1])
    falling = radiograph(tmp_path / "a.dcm", ramp(15), bits=4, VOILUTSequence=Sequence([table]))
    found = grey(falling)
    np.testing.assert_array_equal(found, 255 - ramp(15) * 17)


def test_splits_never_divide_a_patient_folder(tmp_path: Path) -> None:
    for patient in range(12):
        for view in range(3):
            radiograph(tmp_path / "in" / f"p{patient}" / f"{view}.dcm", ramp(500 + 40 * patient + view), bits=12,
                       WindowCenter=2048, WindowWidth=4096)  # fmt: skip
    report = build_xray(tmp_path / "in", tmp_path / "out", patient_folders=True, workers=1)
    rows = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[1:]]
    assert report.rows == len(rows) == 36
    sides = {(row["patient"], row["split"]) for row in rows}
    assert len(sides) == 12
    assert set(report.splits) == {"train", "test"}


def test_a_manifest_in_parquet_says_the_same(tmp_path: Path) -> None:
    radiograph(tmp_path / "in" / "a.dcm", ramp())
    found = []
    for name, flags in {"lines": [], "table": ["--parquet"]}.items():
        done = invoke(main, "data", "xray", "--dicom", tmp_path / "in", "--out", tmp_path / name, *flags)
        assert done.code == 0, done.err
        manifest = next((tmp_path / name).glob("manifest.*"))
        assert str(manifest) in done.out
        found.append((read_header(manifest), [row for _, _, row in read_rows(manifest)]))
    assert manifest.suffix == ".parquet"
    assert found[0] == found[1]


def test_what_cannot_be_used_is_counted_and_strict_stops(tmp_path: Path) -> None:
    source = tmp_path / "in"
    radiograph(source / "good.dcm", ramp())
    radiograph(source / "again.dcm", ramp())
    radiograph(source / "ct.dcm", ramp(), Modality="CT")
    radiograph(source / "empty.dcm", ramp(), PixelData=None)
    radiograph(source / "frames.dcm", ramp(), NumberOfFrames=2)
    (source / "notes.txt").write_text("not a DICOM file at all " * 20)
    broken = radiograph(source / "rle.dcm", ramp())
    compressed = dcmread(broken)
    compressed.compress(RLELossless)
    compressed.PixelData = compressed.PixelData[:40]
    dcmwrite(broken, compressed)
    report = build_xray(source, tmp_path / "out", workers=2)
    assert report.rows == 1
    assert dict(report.skipped.counts) == {
        "same pixels as another file": 1, "modality CT": 1, "no pixel data": 1, "several frames": 1,
        "not a DICOM file": 1, "pixels cannot be decoded (RLE Lossless)": 1,
    }  # fmt: skip
    line = refused(main, "data", "xray", "--dicom", source, "--out", tmp_path / "strict", "--strict")
    assert "ct.dcm" in line or "again.dcm" in line
    assert not (tmp_path / "strict").exists()


def test_a_codec_that_is_not_installed_is_named_with_the_file_and_what_brings_decoders(
    tmp_path: Path,
) -> None:
    """MPEG-2 in place of JPEG 2000: pydicom has no decoder for it, whatever else is installed."""
    radiograph(tmp_path / "in" / "good.dcm", ramp())
    film = dcmread(radiograph(tmp_path / "in" / "film.dcm", ramp()))
    film.PixelData = encapsulate([film.PixelData])
    film["PixelData"].is_undefined_length = True
    film.file_meta.TransferSyntaxUID = MPEG2MPML
    dcmwrite(tmp_path / "in" / "film.dcm", film)
    done = invoke(main, "data", "xray", "--dicom", tmp_path / "in", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    reason = "pixels cannot be decoded (MPEG2 Main Profile / Main Level)"
    (line,) = [line for line in done.err.splitlines() if line.startswith(f"first {reason}")]
    assert f"left out 1 of 2 files: 1 {reason}" in done.err
    assert "film.dcm" in line
    assert "pip install 'mgll-mllm[dicom]'" in line
    strict = refused(main, "data", "xray", "--dicom", tmp_path / "in", "--out", tmp_path / "no", "--strict")
    assert "film.dcm" in strict


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dicom", "nowhere"], "nowhere does not exist"),
        (["--dicom", "in", "--modalities", "MR"], "modality CR"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    radiograph(tmp_path / "in" / "a.dcm", ramp())
    assert complaint in refused(main, "data", "xray", "--out", "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_real_files_are_read(real_data: Path, tmp_path: Path) -> None:
    """Public samples: compressed ones, one without a file meta header, other modalities among them."""
    report = build_xray(real_data / "xray" / "dicom", tmp_path / "out", workers=1)
    assert report.rows >= 4
    images = [np.asarray(Image.open(path)) for path in (tmp_path / "out" / "images").iterdir()]
    assert all(image.dtype == np.uint8 and image.ndim == 2 and image.std() > 5 for image in images)
