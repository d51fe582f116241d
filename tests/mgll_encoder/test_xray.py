"""A user trains on a folder of DICOM radiographs, without revealing anything about the patients."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.datadict import DicomDictionary, keyword_dict
from pydicom.sequence import Sequence
from pydicom.uid import RLELossless

from mgll_encoder.cli import main
from mgll_encoder.data.dicom.pixels import PIXEL_FIELDS
from mgll_encoder.data.dicom.text import TEXT_FIELDS
from mgll_encoder.data.manifest import read_header, read_rows
from mgll_encoder.data.xray import build_xray
from tests.builders import invoke, refused
from tests.mgll_encoder.radiographs import radiograph, ramp

SECRET = "Zyx"
"""Planted in every field that must not be read; letters that occur in no other value."""

TEXTUAL = {
    "AE": SECRET, "CS": SECRET.upper(), "LO": f"{SECRET} Smith", "LT": f"{SECRET} Smith", "PN": f"{SECRET}^Smith",
    "SH": SECRET, "ST": SECRET, "UC": SECRET, "UT": SECRET, "UR": f"http://{SECRET}", "DA": "19570314", "TM": "031415",
    "DT": "19570314031415", "AS": "067Y",
}  # fmt: skip
PLANTED = (SECRET.casefold(), "smith", "19570314", "031415", "067y")


def plant(header: Dataset) -> int:
    """Write the secret into every field of text or date that the dictionary knows and that must not be read."""
    allowed = {
        *TEXT_FIELDS.values(),
        *PIXEL_FIELDS,
        "SpecificCharacterSet",
    }  # the last says how text is encoded
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
    assert list(TEXT_FIELDS.values()) == ["Modality", "StudyDescription", "SeriesDescription"]
    vrs = {name: DicomDictionary[keyword_dict[name]][0] for name in PIXEL_FIELDS}
    assert {name for name, vr in vrs.items() if vr in TEXTUAL} == {
        "PhotometricInterpretation", "RescaleType", "VOILUTFunction",
    }  # fmt: skip


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
    assert line.startswith("DICOM file 2 of 7: modality CT")
    assert not (tmp_path / "strict").exists()


def test_one_file_never_stops_a_folder(tmp_path: Path) -> None:
    """A pipe without a writer, dangling links, pixels larger than memory, a truncated header."""
    source = tmp_path / "in"
    good = radiograph(source / "good.dcm", ramp())
    os.mkfifo(source / "pipe.dcm")
    (source / "gone.dcm").symlink_to("nowhere")
    (source / "loop.dcm").symlink_to("loop.dcm")
    radiograph(source / "huge.dcm", ramp(), Rows=65535, Columns=65535)
    (source / "cut.dcm").write_bytes(good.read_bytes()[:-200])
    (source / "empty.dcm").touch()
    done = invoke(main, "data", "xray", "--dicom", source, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.out.startswith("1 images")
    assert "not a file, for example: DICOM file 3 of 7" in done.err
    assert "too large, for example: DICOM file 5 of 7" in done.err
    assert "left out 6 of 7 files: 3 not a file" in done.err
    assert "Warning" not in done.err


def test_damaged_bytes_anywhere_are_counted_and_say_nothing_raw(tmp_path: Path) -> None:
    """150 files with a few bytes changed, removed or duplicated."""
    draw = random.Random(0)
    whole = bytearray(
        radiograph(tmp_path / "whole.dcm", ramp(), WindowCenter=2048, WindowWidth=4000).read_bytes()
    )
    (tmp_path / "in").mkdir()
    for number in range(150):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(128, len(data))
            match draw.randrange(3):
                case 0:
                    data[place] = draw.randrange(256)
                case 1:
                    del data[place : place + draw.randint(1, 20)]
                case 2:
                    data[place:place] = data[place : place + draw.randint(1, 20)]
        (tmp_path / "in" / f"{number}.dcm").write_bytes(data)
    done = invoke(main, "data", "xray", "--dicom", tmp_path / "in", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    assert all(
        ", for example: DICOM file " in line
        or line.startswith(("left out", "warning: each image", "Decoding"))
        for line in lines
    ), done.err


def test_the_case_that_fuzzing_found(cases: Path, tmp_path: Path) -> None:
    line = refused(
        main, "data", "xray", "--dicom", cases / "fuzz" / "F2_dicom_1693", "--out", tmp_path / "out"
    )
    assert "has no usable image" in line


def test_writing_in_the_picture_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    for number, said in enumerate(["YES", "NO", "", None]):
        fields = {} if said is None else {"BurnedInAnnotation": said}
        fields |= {"WindowCenter": 2048, "WindowWidth": 4096}
        radiograph(tmp_path / "in" / f"{number}.dcm", ramp(1000 + 300 * number), **fields)
    report = build_xray(tmp_path / "in", tmp_path / "out")
    assert (report.rows, dict(report.skipped.counts)) == (3, {"burned-in annotation": 1})
    asked = invoke(main, "data", "xray", "--dicom", tmp_path / "in", "--out", tmp_path / "all", "--burned-in")
    assert asked.out.startswith("4 images")


def test_what_the_header_calls_its_people_is_cut_out_of_the_texts(tmp_path: Path) -> None:
    fields = {
        "PatientName": "ZYX^ANNA",
        "StudyDescription": "XR CHEST Anna Zyx",
        "SeriesDescription": "zyx, 31.01.1970",
    }
    radiograph(tmp_path / "in" / "ZYX_ANNA" / "ZYX.dcm", ramp(), **fields)
    (tmp_path / "in" / "ZYX_ANNA" / "ZYX_broken.dcm").write_text("ZYX^ANNA")
    done = invoke(
        main, "data", "xray", "--dicom", tmp_path / "in", "--out", tmp_path / "out", "--patient-folders"
    )
    assert done.code == 0, done.err
    assert "2 study and series descriptions" in done.err
    manifest = (tmp_path / "out" / "manifest.jsonl").read_text()
    header, row = map(json.loads, manifest.splitlines())
    assert row["texts"] == {"modality": ["CR"], "study": ["XR CHEST"]}
    assert header["built"]["descriptions_cut"] == 2
    assert "zyx" not in (manifest + done.out + done.err).casefold()


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
