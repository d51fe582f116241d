"""Texts of a DICOM header, without anything that identifies a person.

Study and series descriptions are typed by people. They are compared with the names and numbers of the same header,
which are read only for this purpose: words that occur there are removed, and so are all dates and long numbers.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mgll_encoder.data.dicom.header import UnusableDicomError, value

TEXT_FIELDS = {"modality": "Modality", "study": "StudyDescription", "series": "SeriesDescription"}
"""Granularity, coarse to fine -> the header field that its text comes from; no other text is written."""

NAME_FIELDS = (
    "PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName", "ResponsiblePerson",
    "ReferringPhysicianName", "ConsultingPhysicianName", "PerformingPhysicianName", "RequestingPhysician",
    "PhysiciansOfRecord", "NameOfPhysiciansReadingStudy", "OperatorsName",
)  # fmt: skip
"""Fields with names of persons."""

NUMBER_FIELDS = (
    "PatientID", "OtherPatientIDs", "OtherPatientIDsSequence", "AccessionNumber", "AdmissionID", "MedicalRecordLocator",
    "PatientTelephoneNumbers",
)  # fmt: skip
"""Fields with numbers of a patient or a visit; for a sequence, the `PatientID` of its items."""

PLACE_FIELDS = ("InstitutionName", "InstitutionAddress", "PatientAddress")
"""Fields with places. Their single words (general, chest) are harmless, so only the full name is removed."""

BIRTH_DATE = "PatientBirthDate"
IDENTITY_FIELDS = (*NAME_FIELDS, *NUMBER_FIELDS, *PLACE_FIELDS, BIRTH_DATE)
"""Fields that are compared with the texts, and never written."""

LONGEST = 1024
"""Longer texts (the standard allows 64 characters) are omitted."""

HONORIFICS = frozenset({"dr", "md", "prof", "mr", "mrs", "ms", "jr", "sr", "phd", "rt", "ii", "iii", "iv"})
"""Parts of names that identify nobody, and may be words of a description ("DR CHEST": digital radiography)."""

_MONTH = (
    r"(?:jan|f[eé][bv]|m[aä]r|mrz|a[pv]r|abr|ma[iyg]|ju[inl]|giu|lug|a[ugo][goû]|sep|set|o[ckt]t|out|nov|"
    r"d[eé][ciz]|gen|ene)[^\W\d_]*\.?"
)
_ALWAYS_CUT = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?<!\d)\d{1,2}\s?[./-]\s?\d{1,2}\s?[./-]\s?(?:\d{4}|\d{2})(?!\d)",  # 31.01.1970, 1/31/70
        r"(?<!\d)\d{4}\s?[./年-]\s?\d{1,2}\s?[./月-]\s?\d{1,2}日?(?!\d)",  # 1970-01-31
        rf"(?<!\d)\d{{1,2}}(?:st|nd|rd|th|\.)?[\s/-]*{_MONTH}[\s,/-]*\d{{2,4}}(?!\d)",  # 31 Jan 1970
        rf"(?<![^\W\d_]){_MONTH}[\s/-]*\d{{1,2}}(?:st|nd|rd|th)?[\s,/-]+\d{{2,4}}(?!\d)",  # January 31, 1970
        r"\+?\d(?:[\s./()-]{0,2}\d){5,}",  # six digits or more: record and telephone numbers, 19700131
        r"\S+@\S+",
    )
)
"""Dates in common notations, long numbers, e-mail addresses."""

_LETTERS = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_WORD = re.compile(r"[^\W_]+")
_INSIDE, _INSIDE_CJK = 4, 2
"""Minimum length in letters (ideographs) of a name or number to be searched inside words; shorter ones are common."""

_SPELT_OUT = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa"})
_PLAIN = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe", "ı": "i"})


@dataclass
class Identity:
    """Identifying information of a header, in the forms that texts are compared with.

    Attributes:
        names: Words of names, and names written as one word.
        numbers: Numbers, reduced to letters and digits.
        places: Words of each place.
    """

    names: set[str] = field(default_factory=set)
    numbers: set[str] = field(default_factory=set)
    places: list[list[str]] = field(default_factory=list)


def safe_texts(header: Any) -> tuple[dict[str, list[str]], int]:
    """Return the texts of a header, and how many were shortened or omitted because they may name a person.

    Args:
        header: A pydicom data set with `TEXT_FIELDS` and `IDENTITY_FIELDS`.

    Returns:
        Granularity -> its text, if anything is left of it; and the number.
    """
    texts = {level: _said(header, name) for level, name in TEXT_FIELDS.items()}
    typed = [level for level in texts if level != "modality"]
    try:
        identity = read_identity(header)
        kept = texts | {level: without_identity(texts[level], identity) for level in typed}
    except UnusableDicomError:  # nothing to compare with
        kept = texts | dict.fromkeys(typed, "")
    cut = sum(kept[level] != text for level, text in texts.items())
    return {level: [text] for level, text in kept.items() if text}, cut


def read_identity(header: Any) -> Identity:
    """Read the names, numbers and places of a header.

    Raises:
        UnusableDicomError: a field is damaged.
    """
    identity = Identity()
    for name in NAME_FIELDS:
        for person in _values(header, name):
            for component in re.split(r"[\^=,;]", person):
                words = _LETTERS.findall(component)
                for word in (*words, "".join(words)):
                    identity.names |= {form for form in _forms(word) if len(form) > 1} - HONORIFICS
    for name in NUMBER_FIELDS:
        for number in _values(header, name):
            parts = [
                part for part in _WORD.findall(number) if any(map(str.isdigit, part)) and len(part) >= _INSIDE
            ]
            for part in ("".join(_WORD.findall(number)), *parts):
                forms = {_plain(part), _plain(part).lstrip("0")}
                identity.numbers |= {form for form in forms if len(form) > 1}
    if birth := "".join(_values(header, BIRTH_DATE)):
        identity.numbers.add(birth[:4])
    identity.places = [_words(place) for name in PLACE_FIELDS for place in _values(header, name)]
    return identity


def without_identity(text: str, identity: Identity) -> str:
    """Remove the words and numbers of an identity, dates, and long numbers from a text; empty if little is left."""
    if len(text) > LONGEST:
        return ""
    spans = [found.span() for pattern in _ALWAYS_CUT for found in pattern.finditer(text)]
    spans += [
        *_names_in(text, identity.names),
        *_numbers_in(text, identity.numbers),
        *_places_in(text, identity.places),
    ]
    if not spans:
        return text
    gone = {place for start, end in spans for place in range(start, end)}
    left = "".join(" " if place in gone else letter for place, letter in enumerate(text))
    words = [word.strip("^=,;:/_-'’") for word in left.split()]
    kept = " ".join(word for word in words if any(map(str.isalnum, word)))
    return kept if len(_LETTERS.findall(kept)) and max(map(len, _LETTERS.findall(kept))) > 1 else ""


def _names_in(text: str, names: set[str]) -> Iterator[tuple[int, int]]:
    words = list(_LETTERS.finditer(text))
    for word in words:
        if any(_is_name(form, names) for form in _forms(word.group())):
            yield word.span()
    for first, second in pairwise(words):  # "MC DONALD"
        if _forms(first.group() + second.group()) & names:
            yield first.start(), second.end()


def _is_name(word: str, names: set[str]) -> bool:
    """Return whether a word is a name, contains one, or consists of several."""
    if any(name in word for name in names if len(name) >= (_INSIDE_CJK if name[0] >= "⺀" else _INSIDE)):
        return True
    ends = {0}
    for start in range(len(word)):
        if start in ends:
            ends |= {start + len(name) for name in names if word.startswith(name, start)}
    return len(word) in ends


def _numbers_in(text: str, numbers: set[str]) -> Iterator[tuple[int, int]]:
    """Yield the positions of numbers, whatever separates their parts."""
    for word in _WORD.finditer(text):
        if {_plain(word.group()), _plain(word.group()).lstrip("0")} & numbers:
            yield word.span()
    letters = [
        (place, form) for place, letter in enumerate(text) if letter.isalnum() for form in _plain(letter)
    ]
    joined = "".join(form for _, form in letters)
    for number in numbers:
        start = joined.find(number) if len(number) >= _INSIDE else -1
        while start >= 0:
            yield letters[start][0], letters[start + len(number) - 1][0] + 1
            start = joined.find(number, start + 1)


def _places_in(text: str, places: list[list[str]]) -> Iterator[tuple[int, int]]:
    found = list(_WORD.finditer(text))
    words = [_plain(word.group()) for word in found]
    for place in places:
        if sum(map(len, place)) < _INSIDE:
            continue
        for start in range(len(words) - len(place) + 1):
            if words[start : start + len(place)] == place:
                yield found[start].start(), found[start + len(place) - 1].end()


def _said(header: Any, name: str) -> str:
    """Return a text as one line of printable characters; empty if it is damaged."""
    try:
        whole = " ".join(_values(header, name))
    except UnusableDicomError:
        return ""
    text = unicodedata.normalize("NFKC", whole)
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _values(header: Any, name: str) -> list[str]:
    """Return a field's values as texts; for a sequence, the `PatientID` of its items."""
    found = value(header, name)
    if name.endswith("Sequence"):
        return [one for item in found or () for one in _values(item, "PatientID")]
    if found is None:
        return []
    several = (
        not isinstance(found, (str, bytes))
        and hasattr(found, "__iter__")
        and not hasattr(found, "components")
    )
    return [unicodedata.normalize("NFKC", str(one)) for one in (found if several else [found])]


def _words(text: str) -> list[str]:
    return [_plain(word) for word in _WORD.findall(text)]


def _forms(word: str) -> set[str]:
    """Return the spellings of a name: without accents (Muller), with umlauts written out (Mueller)."""
    bare = word.replace("'", "").replace("’", "")
    return {_plain(bare), _plain(bare.casefold().translate(_SPELT_OUT))}


def _plain(text: str) -> str:
    """Convert to lowercase without accents."""
    apart = unicodedata.normalize("NFKD", text.casefold()).translate(_PLAIN)
    return "".join(letter for letter in apart if not unicodedata.combining(letter))
