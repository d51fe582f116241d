"""Damage to files: plain bytes, and what knows the structure of a format.

A mutator takes the bytes of a valid file, a source of chance, and the bytes of another valid file to splice with. Those
for a format fall back to plain bytes where its file can no longer be parsed, so that edits can follow one another.
"""

import contextlib
import csv
import io
import json
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random, bytes], bytes]

MARKER = "executed"
"""File that planted code would write into the working folder."""

DEEP, HUGE = "\ue000deep", "\ue000huge"
"""Placeholders for what ``json.dumps`` cannot write: 20,000 brackets, and an integer of 5,000 digits."""

SCALARS: Sequence[Any] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63) - 1, 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), float("-inf"), "", " ", "0", "nan", "null", "\0", "\x1b[31mred",
    "[bold]x[/bold]", "[/x]", "\ud800", "\u2028", "\U0001f4a5", "e\u0301", "x" * 70_000, "../../../etc/passwd",
    "/dev/zero", ".", "a/b", "{0}", "%s", HUGE, DEEP,
)  # fmt: skip
"""Values that stand where something else is expected."""

VALUES: Sequence[Any] = (*SCALARS, [], {}, [[]], [None], [1, "a"], {"a": 1}, {"": None}, [float("nan")] * 3)


def flip_bits(data: bytes, random: Random, other: bytes) -> bytes:
    """Turn over one to eight bits."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 8) if changed else 0):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def truncate(data: bytes, random: Random, other: bytes) -> bytes:
    """Keep only a beginning."""
    return data[: random.randrange(len(data) + 1)]


def cut_out(data: bytes, random: Random, other: bytes) -> bytes:
    """Lose a piece in between."""
    start, end = _span(data, random)
    return data[:start] + data[end:]


def insert(data: bytes, random: Random, other: bytes) -> bytes:
    """Put foreign bytes in between."""
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.choice((1, 2, 4, 16, 300))) + data[at:]


def repeat(data: bytes, random: Random, other: bytes) -> bytes:
    """Say a piece several times."""
    start, end = _span(data, random)
    return data[:end] + data[start:end] * random.randint(1, 20) + data[end:]


def splice(data: bytes, random: Random, other: bytes) -> bytes:
    """Go on with another file in the middle."""
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


def extreme_number(data: bytes, random: Random, other: bytes) -> bytes:
    """Overwrite bytes with the least or greatest of an integer."""
    size = random.choice((1, 2, 4, 8))
    value = random.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\x01")) + random.choice((b"\0", b"\xff")) * (
        size - 1
    )
    at = random.randrange(max(1, len(data) - size))
    return data[:at] + (value if random.random() < 0.5 else value[::-1]) + data[at + size :]


def nothing(data: bytes, random: Random, other: bytes) -> bytes:
    """An empty file, or one of zeros."""
    return random.choice((b"", b"\0" * 64, b"\n"))


def another_encoding(data: bytes, random: Random, other: bytes) -> bytes:
    """The same text with a byte order mark, in UTF-16 or in Latin-1."""
    text = data.decode("utf-8", "replace") + random.choice(("", "é"))
    return text.encode(random.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1")), "replace")


def lines(data: bytes, random: Random, other: bytes) -> bytes:
    """Lose, double, exchange or empty lines."""
    rows = data.split(b"\n")
    i, j = random.randrange(len(rows)), random.randrange(len(rows))
    action = random.randrange(5)
    if action == 0:
        del rows[i]
    elif action == 1:
        rows.insert(j, rows[i])
    elif action == 2:
        rows[i], rows[j] = rows[j], rows[i]
    elif action == 3:
        rows[i] = b""
    else:
        return random.choice((b"\r\n", b"\r", b"\n\n", b" ")).join(rows)
    return b"\n".join(rows)


def words(data: bytes, random: Random, other: bytes) -> bytes:
    """Put a nasty value where a word or number stands."""
    places = list(re.finditer(rb"[\w.+-]+", data))
    if not places:
        return insert(data, random, other)
    found = random.choice(places)
    return (
        data[: found.start()]
        + _as_text(random.choice(SCALARS)).encode("utf-8", "surrogatepass")
        + data[found.end() :]
    )


def json_value(data: bytes, random: Random, other: bytes) -> bytes:
    """Change one value, key or list of a JSON text."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return words(data, random, other)
    try:
        return _dumps(_changed(root, random))
    except (ValueError, RecursionError):  # a number that cannot be written any more
        return flip_bits(data, random, other)


def doubled_key(data: bytes, random: Random, other: bytes) -> bytes:
    """Name a key of a JSON object twice."""
    keys = list(re.finditer(rb'"[^"\\]*"\s*:', data))
    if not keys:
        return flip_bits(data, random, other)
    key = random.choice(keys)
    return data[: key.start()] + key.group() + _dumps(random.choice(VALUES)) + b"," + data[key.start() :]


def json_line(data: bytes, random: Random, other: bytes) -> bytes:
    """Change one line of a JSON Lines text."""
    rows = data.split(b"\n")
    i = random.randrange(len(rows))
    rows[i] = random.choice((json_value, doubled_key))(rows[i], random, other)
    return b"\n".join(rows)


YAML = (
    "!!float x", "!!int y", "!!binary '%'", "!!timestamp x",
    "!!python/object/apply:os.system ['touch executed']", "&a [*a]", "*nobody", "{? [1, 2] : 3}", "<<: 1",
    ".nan", ".inf", "1e999", "0x" + "f" * 3000, "9" * 5000, "2026-13-45", "2026-11-30", "1:2:3", "012", "yes",
    "~", "- a\n  - b", "{a: b, a: c}", "[" * 2000, "{a: " * 2000, "'", '"\\ud800"', "|", ">", "\t",
    "&b [x, x, x, x, x, x, x, x]", "%TAG ! x", "--- 1\n--- 2", "0o8", "-.inf", "1_000_", "''", "[]", "{}",
    "null",
)  # fmt: skip
"""Values that YAML reads in its own way."""


def yaml_value(data: bytes, random: Random, other: bytes) -> bytes:
    """Change the value of a line, or its key."""
    rows = data.decode("utf-8", "replace").split("\n")
    i = random.randrange(len(rows))
    key, colon, value = rows[i].partition(":")
    new = random.choice((*YAML, _as_text(random.choice(SCALARS))))
    rows[i] = f"{key}{colon} {new}" if random.random() < 0.8 else f"{new}{colon}{value}"
    return "\n".join(rows).encode("utf-8", "surrogatepass")


def table_cell(data: bytes, random: Random, other: bytes) -> bytes:
    """Change a cell, a row, the header or the delimiter of a CSV or TSV file."""
    try:
        text = data.decode()
        delimiter = "\t" if "\t" in text.split("\n")[0] else ","
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter))
        row = random.choice([0, random.randrange(len(rows))])
        cell = random.randrange(len(rows[row]))
    except (ValueError, IndexError, csv.Error):
        return lines(data, random, other)
    action = random.randrange(8)
    if action == 0:
        del rows[row][cell]
    elif action == 1:
        rows[row].insert(cell, random.choice(rows[row]))
    elif action == 2:
        rows[row][cell] = rows[random.randrange(len(rows))][0]
    elif action == 3:
        rows[row][cell] = random.choice(
            ('"', "a\nb", "\0", "x" * 200_000, "a;b;;", "-1", "1.0", "=1+1", "\ufeff")
        )
    elif action == 4:
        delimiter = random.choice(";|\t, ")
    elif action == 5:
        rows[0][random.randrange(len(rows[0]))] = random.choice(("", " ", rows[0][0], "Unnamed: 0"))
    else:
        rows[row][cell] = _as_text(random.choice(SCALARS))
    out = io.StringIO()
    try:
        csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows(rows)
    except csv.Error:
        return flip_bits(data, random, other)
    return out.getvalue().encode("utf-8", "surrogatepass")


def safetensors_header(data: bytes, random: Random, other: bytes) -> bytes:
    """Lie about the header's length, or change the header."""
    if len(data) < 8:
        return insert(data, random, other)
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.3:
        lie = random.choice(
            (0, 1, length - 1, length + 1, len(data), len(data) - 8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)
        )
        return min(max(lie, 0), 2**64 - 1).to_bytes(8, "little") + data[8:]
    header = random.choice((json_value, doubled_key))(data[8 : 8 + length], random, other)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def zip_member(data: bytes, random: Random, other: bytes) -> bytes:
    """Remove, rename, double or damage a member of a zip file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        i = random.randrange(len(members))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, RuntimeError, zlib.error):
        return flip_bits(data, random, other)
    name, content = members[i]
    action = random.randrange(6)
    if action == 0:
        del members[i]
    elif action == 1:
        members[i] = (
            random.choice(("x", "../x", "/x", "archive/constants.pkl", "archive/data.pkl", name.upper())),
            content,
        )
    elif action == 2:
        members.append((name, content[::-1]))
    elif action == 3:
        members[i] = (name, b"\0" * random.choice((0, 1, 1 << 20)))
    else:
        inner = random.choice(MUTATORS[kind_of(name)])
        members[i] = (name, inner(content, random, other))
    out = io.BytesIO()
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return out.getvalue()


EVIL = b"cos\nsystem\n(S'touch " + MARKER.encode() + b"'\ntR0"
"""Opcodes that run a shell command and drop its result."""


def pickle_opcode(data: bytes, random: Random, other: bytes) -> bytes:
    """Exchange, remove or insert an opcode of a pickle."""
    places: list[int] = []
    with contextlib.suppress(ValueError, LookupError, OverflowError):  # as far as it can be read
        places.extend(at for _, _, at in pickletools.genops(data) if at is not None)
    if len(places) < 3:
        return flip_bits(data, random, other)
    i = random.randrange(1, len(places) - 1)
    start, end = places[i], places[i + 1]
    action = random.randrange(4)
    if action == 0:
        return data[:start] + EVIL + data[start:]
    if action == 1:
        return data[:start] + data[end:]
    if action == 2:
        return data[:start] + random.choice(pickletools.opcodes).code.encode("latin-1") + data[start + 1 :]
    j = random.randrange(1, len(places) - 1)
    return data[:start] + data[places[j] : places[j + 1]] + data[end:]


def png_chunk(data: bytes, random: Random, other: bytes) -> bytes:
    """Remove, double, exchange or damage a chunk of a PNG file; checksums are right again."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return flip_bits(data, random, other)
    i = random.randrange(len(chunks))
    action = random.randrange(5)
    if action == 0:
        del chunks[i]
    elif action == 1:
        chunks.insert(random.randrange(len(chunks)), chunks[i])
    elif action == 2:
        kind = random.choice(
            (b"tEXt", b"zTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"gAMA", b"acTL", b"fcTL")
        )
        chunks.insert(1, (kind, random.randbytes(random.randint(0, 40))))
    elif action == 3:
        width, height = (random.choice((0, 1, 28, 40, 70_000, 2**31 - 1)) for _ in range(2))
        depth, color = random.choice((1, 2, 4, 8, 16, 3)), random.choice((0, 2, 3, 4, 6, 1))
        chunks[0] = (
            b"IHDR",
            struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, random.choice((0, 1, 2))),
        )
    else:
        chunks[i] = (chunks[i][0], random.choice(BYTES)(chunks[i][1], random, other))
    return data[:8] + b"".join(
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks
    )


def tiff_entry(data: bytes, random: Random, other: bytes) -> bytes:
    """Change an entry of a TIFF file's directory: its tag, type, count or value."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        return flip_bits(data, random, other)
    (at,) = struct.unpack(f"{order}I", data[4:8])
    if at + 2 > len(data):
        return flip_bits(data, random, other)
    (count,) = struct.unpack(f"{order}H", data[at : at + 2])
    entry = at + 2 + 12 * random.randrange(max(count, 1))
    start, size = random.choice(((0, 2), (2, 2), (4, 4), (8, 4)))
    number = random.choice(
        (0, 1, 2, 3, 8, 16, 32, 255, 256, 258, 259, 262, 277, 339, 65535, 2**31 - 1, 2**32 - 1)
    )
    value = (number % 2 ** (8 * size)).to_bytes(size, "little" if order == "<" else "big")
    return data[: entry + start] + value + data[entry + start + size :]


TEMPLATE = (
    "{% for i in range(10**12) %}x{% endfor %}", "{{ 'x' * 10**10 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ 1 // 0 }}", "{{ messages[99]['content'] }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% include 'config.json' %}",
    "{{ cycler.__init__.__globals__.os.system('touch executed') }}", "{% if %}", "{{ x", "{% endfor %}",
    "{{ raise_exception('no') }}", "{% generation %}", "{{ nobody.nothing }}", "{{ 'a'|nofilter }}",
    "{% set a = [] %}{% set _ = a.append(a) %}{{ a|tojson }}", "{{ (10**10)**(10**5) }}", "{{ lipsum }}",
    "{{ strftime_now('%Y') }}", "{{ 'x'.format(1) }}", "{{ '%10000000000d' % 1 }}", "<image>",
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "{{ messages }}", "\0",
)  # fmt: skip
"""Pieces of templates that break, run for ever, or try to get out."""


def template_piece(data: bytes, random: Random, other: bytes) -> bytes:
    """Put a piece into a template, or instead of one of its own."""
    pieces = re.split(rb"(\{[{%].*?[%}]\})", data)
    i = random.randrange(len(pieces))
    piece = random.choice(TEMPLATE).encode()
    pieces[i] = random.choice((piece, pieces[i] + piece, b"", piece + pieces[i]))
    return b"".join(pieces)


DICOM = (
    "Modality", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "SamplesPerPixel", "WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept", "NumberOfFrames",
    "PhotometricInterpretation", "PixelData", "PixelPaddingValue", "SpecificCharacterSet", "StudyDescription",
    "SeriesDescription", "BurnedInAnnotation", "VOILUTFunction", "PlanarConfiguration", "LossyImageCompression",
    "PresentationLUTShape", "PatientName",
)  # fmt: skip
"""Fields that decide what becomes of a radiograph."""

DICOM_VALUES = (
    b"", b"0", b"-1", b"1\\2", b"\\", b"nan", b"1e400", b"inf", b"0.0", b"99999999999", b"x" * 70_000,
    b"\xff\xfe", b"\x1b[31m", b"MONOCHROME1", b"PALETTE COLOR", b"RGB", b"ISO 2022 IR 87", b"nowhere", b"\0\0",
    b"\xff\xff", b"\x01\0", b"\x10\0", b"YES",
)  # fmt: skip


def dicom_value(data: bytes, random: Random, other: bytes) -> bytes:
    """Set, empty or remove a field of a DICOM file."""
    from pydicom import config, dcmread
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import DataElement
    from pydicom.tag import Tag

    config.settings.reading_validation_mode = config.settings.writing_validation_mode = config.IGNORE
    try:
        header = dcmread(io.BytesIO(data), force=True)
        keyword = random.choice(DICOM)
        tag = Tag(tag_for_keyword(keyword) or 0)
        action = random.randrange(4)
        if action == 0:
            header.pop(tag, None)
        elif action == 1:
            tag = random.choice(sorted(header.keys()))
            header.pop(tag)
        else:
            vr = (
                dictionary_VR(tag).split(" ")[0]
                if random.random() < 0.6
                else random.choice(("US", "LO", "DS", "SQ"))
            )
            value: Any = random.choice(DICOM_VALUES)
            if vr in ("US", "SS"):
                value = random.choice(("", 0, 1, 2, 8, 12, 16, 32, 255, 40_000, [1, 2]))
            elif vr == "SQ":
                value = []
            elif vr not in ("OB", "OW"):
                value = value.decode("latin-1")
            header[tag] = DataElement(tag, vr, value, validation_mode=config.IGNORE)
        out = io.BytesIO()
        header.save_as(out, enforce_file_format=False)
        return out.getvalue()
    except Exception:  # what cannot be written is no input
        return flip_bits(data, random, other)
    finally:
        config.settings.reading_validation_mode = config.settings.writing_validation_mode = None


def parquet_column(data: bytes, random: Random, other: bytes) -> bytes:
    """Drop, rename, double or retype a column of a Parquet file, or lose its metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(io.BytesIO(data), use_threads=False)
        names, i = table.column_names, random.randrange(table.num_columns)
        action = random.randrange(6)
        if action == 0:
            table = table.remove_column(i)
        elif action == 1:
            table = table.rename_columns([*names[:i], random.choice(("", "x", names[0])), *names[i + 1 :]])
        elif action == 2:
            table = table.append_column(random.choice(("x", names[i])), table.column(i))
        elif action == 3:
            meta = {
                k: random.choice(BYTES)(v, random, other) for k, v in (table.schema.metadata or {}).items()
            }
            table = table.replace_schema_metadata(random.choice((None, {}, meta)))
        else:
            values = random.choice(
                (pa.nulls(len(table)), pa.array([float("nan")] * len(table)), pa.array([b"\xff"] * len(table)),
                 pa.array([["a"]] * len(table)), pa.array(range(len(table))), pa.array([{"a": None}] * len(table)))
            )  # fmt: skip
            table = table.set_column(i, names[i], values)
        out = io.BytesIO()
        parquet.write_table(random.choice((table, table.slice(0, 0), table)), out)
        return out.getvalue()
    except (pa.ArrowException, OSError, ValueError, IndexError):
        return flip_bits(data, random, other)


BYTES: Sequence[Mutator] = (flip_bits, truncate, cut_out, insert, repeat, splice, extreme_number, nothing)
TEXT: Sequence[Mutator] = (lines, words, another_encoding)
JSON: Sequence[Mutator] = (json_value,) * 6 + (doubled_key,)

MUTATORS: Mapping[str, Sequence[Mutator]] = {
    "bytes": BYTES, "text": (*TEXT, *BYTES, words, words), "json": (*JSON, *TEXT, *BYTES),
    "jsonl": ((json_line,) * 6 + (*TEXT, *BYTES)), "yaml": ((yaml_value,) * 6 + (*TEXT, *BYTES)),
    "table": ((table_cell,) * 6 + (*TEXT, *BYTES)), "safetensors": ((safetensors_header,) * 6 + (*BYTES,)),
    "zip": ((zip_member,) * 8 + (*BYTES,)), "pickle": ((pickle_opcode,) * 6 + (*BYTES,)),
    "png": ((png_chunk,) * 6 + (*BYTES,)), "tiff": ((tiff_entry,) * 6 + (*BYTES,)),
    "dicom": ((dicom_value,) * 8 + (*BYTES,)), "parquet": ((parquet_column,) * 6 + (*BYTES,)),
    "template": ((template_piece,) * 6 + (*TEXT, *BYTES)),
}  # fmt: skip
"""Kind of file to its mutators; what stands there more often is drawn more often."""

KINDS: Mapping[str, str] = {
    ".json": "json", ".jsonl": "jsonl", ".yaml": "yaml", ".csv": "table", ".tsv": "table",
    ".safetensors": "safetensors", ".pt": "zip", ".pth": "zip", ".bin": "zip", ".xlsx": "zip", ".pkl": "pickle",
    ".png": "png", ".tif": "tiff", ".dcm": "dicom", ".parquet": "parquet", ".jinja": "template", ".txt": "text",
    ".md": "text", ".xml": "text",
}  # fmt: skip
"""Suffix to kind; all others are bytes."""


def kind_of(name: str) -> str:
    """The kind of file that a name promises."""
    return KINDS.get(PurePath(name).suffix, "bytes")


def mutate(name: str, data: bytes, seed: int, other: bytes) -> bytes:
    """Damage a file once, in a way that the seed decides."""
    random = Random(seed)
    kind = "pickle" if kind_of(name) == "zip" and data[:1] == b"\x80" else kind_of(name)
    return random.choice(MUTATORS[kind])(data, random, other)


def _span(data: bytes, random: Random) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice((1, 2, 8, 64, 1000)))


def _as_text(value: Any) -> str:
    """A value as it may stand in a table or in YAML."""
    if value is HUGE:
        return "9" * 5000
    if value is DEEP:
        return "[" * 2000
    return str(value)


def _dumps(value: Any) -> bytes:
    text = json.dumps(value)
    text = text.replace(json.dumps(HUGE), "9" * 5000).replace(json.dumps(DEEP), "[" * 20_000 + "]" * 20_000)
    return text.encode()


def _changed(root: Any, random: Random) -> Any:
    """A JSON value with one change somewhere."""
    places: list[tuple[Any, Any]] = []  # container and key
    todo = [root]
    while todo:
        node = todo.pop()
        children = (
            list(node.items())
            if isinstance(node, dict)
            else list(enumerate(node))
            if isinstance(node, list)
            else []
        )
        places += [(node, key) for key, _ in children]
        todo += [child for _, child in children]
    if not places or random.random() < 0.03:
        return random.choice(VALUES)
    node, key = random.choice(places)
    action = random.randrange(10)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[random.choice(("", "x", f" {key}", str(key).upper(), "\ud800"))] = node.pop(key)
    elif action == 1:
        node.insert(key, random.choice(VALUES))
    elif action == 2:
        other, there = random.choice(places)
        node[key] = json.loads(json.dumps(other[there]))  # a value of this file, in another place
    elif action == 3 and isinstance(node[key], int | float):
        node[key] = random.choice(
            (-node[key], node[key] + 1, node[key] * 1000, str(node[key]), float(node[key]))
        )
    else:
        node[key] = random.choice(VALUES)
    return root
