"""DICOM descriptions may name people; the texts that are kept do not."""

import time

import pytest
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from mgll_encoder.data.dicom.text import safe_texts


def header(study: str, **fields: object) -> Dataset:
    found = Dataset()
    found.Modality, found.StudyDescription = "CR", study
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def study(text: str, **fields: object) -> str:
    """Return what is kept of a study description."""
    texts, cut = safe_texts(header(text, **fields))
    left = " ".join(texts.get("study", [""]))
    assert cut == (left != text)
    return left


@pytest.mark.parametrize(
    ("name", "text", "left"),
    [
        ("DOE^JOHN", "John Doe CHEST PA", "CHEST PA"),
        ("DOE^JOHN", "CHEST doe,john", "CHEST"),
        ("DOE^JOHN", "JOHNDOE knee", "knee"),
        ("DOE^JOHN", "DOE_J CHEST", "J CHEST"),
        ("Doe^John^^DR", "DR CHEST 2 VIEWS", "DR CHEST 2 VIEWS"),
        ("Müller^Jörg", "Mueller Joerg THORAX", "THORAX"),
        ("MUELLER^JOERG", "THORAX MUELLER", "THORAX"),
        ("Müller^Jörg", "Muller THORAX jorg", "THORAX"),
        ("Núñez^José", "NUNEZ hand Jose", "hand"),
        ("O'Brien^Pat", "obrien foot", "foot"),
        ("OBRIEN^PAT", "O’Brien foot", "foot"),
        ("McDonald^Ann", "hip MC DONALD", "hip"),
        ("Smith-Jones^Eve", "hip smithjones", "hip"),
        ("Smith-Jones^Eve", "JONES hip", "hip"),
        ("Li^Kim", "CLINICAL kim li abdomen", "CLINICAL abdomen"),
        ("Yamada^Tarou=山田^太郎=やまだ^たろう", "山田太郎 胸部", "胸部"),
        ("DOE^JOHN", "DOE, JOHN", ""),
    ],
)
def test_names_are_cut_however_they_are_written(name: str, text: str, left: str) -> None:
    assert study(text, PatientName=name) == left
    assert study(text, OperatorsName=["Other^One", name]) == left


@pytest.mark.parametrize(
    "text",
    [
        "XR CHEST 2 VIEWS", "XR C Spine Comp Min 4 Views", "Malignant mass with micro-calcifications", "C1-2-3 SPINE",
        "T12-L5 AP/LAT", "CHEST^PA", "ABDOMEN 2 or 3 views", "THORAX 2016", "80 kV 2.5 mAs", "胸部正面",
    ],
)  # fmt: skip
def test_what_names_nobody_stays(text: str) -> None:
    people = {"PatientName": "Doe^John", "PatientID": "77654033", "PatientBirthDate": "19700131"}
    assert study(text, **people, InstitutionName="General Chest Hospital", AccessionNumber="2") == text


@pytest.mark.parametrize(
    "said",
    [
        "19700131", "31011970", "31.01.1970", "1970-01-31", "1970-1-5", "31/1/70", "31 01 1970", "31 Jan 1970",
        "31-JAN-70", "31. Januar 1970", "January 31, 1970", "1970年1月31日", "1970", "700131",
    ],
)  # fmt: skip
def test_dates_are_cut_in_any_format(said: str) -> None:
    for text in (f"{said} CHEST", f"CHEST {said}", f"CHEST ({said})"):
        left = study(text, PatientBirthDate="19700131")
        assert "CHEST" in left
        assert not any(map(str.isdigit, left)), left


@pytest.mark.parametrize(
    ("fields", "text", "left"),
    [
        ({"PatientID": "AB-0042"}, "CHEST ab0042", "CHEST"),
        ({"PatientID": "AB-0042"}, "CHEST AB 0042", "CHEST"),
        ({"PatientID": "0042"}, "CHEST 42 PA", "CHEST PA"),
        ({"PatientID": "P1"}, "P1 CHEST", "CHEST"),
        ({"PatientID": "4711^^^CITY"}, "CHEST 4711", "CHEST"),
        ({"AccessionNumber": "X77Q9"}, "CHEST-X77Q9", "CHEST"),
        ({"OtherPatientIDs": ["K55", "L66"]}, "CHEST L66", "CHEST"),
        ({}, "CHEST +49 170 555 12 34", "CHEST"),
        ({}, "CHEST 123-45-6789", "CHEST"),
        ({}, "CHEST jd@clinic.example", "CHEST"),
        ({"InstitutionName": "St. Mary Hospital"}, "CHEST St Mary Hospital", "CHEST"),
    ],
)
def test_numbers_and_places_are_cut(fields: dict[str, object], text: str, left: str) -> None:
    assert study(text, **fields) == left


def test_numbers_of_a_nested_sequence_are_cut() -> None:
    other = Dataset()
    other.PatientID = "K5577"
    assert study("CHEST K5577", OtherPatientIDsSequence=Sequence([other])) == "CHEST"


def test_texts_that_cannot_be_compared_are_left_out() -> None:
    """A name that cannot be read may be in the description."""
    found = header("CHEST")
    tag = Tag("OtherPatientIDsSequence")
    found[tag] = RawDataElement(tag, "SQ", 3, b"\x00\x01\x02", 0, False, True)
    texts, cut = safe_texts(found)
    assert (texts, cut) == ({"modality": ["CR"]}, 1)


@pytest.mark.parametrize("text", ["1" * 4000, "aa" * 500, "1.2" * 300, "jan/" * 250 + "jan", "(" * 1000])
def test_no_text_takes_long(text: str) -> None:
    began = time.monotonic()
    study(text, PatientName="aa^aaa^aaaa", PatientID="1" * 64)
    assert time.monotonic() - began < 2
