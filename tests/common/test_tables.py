"""Label tables as exported by Excel, R or pandas, or received by mail."""

from pathlib import Path

import pytest

from mgll_encoder.common.errors import BadDataError, UserError
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.tables import Table, TableOptions, read_table

COLUMNS = ("file", "labels", "patient")
ROWS = [("1.png", "glaucoma; myopia", "Müller"), ("2.png", 'a "cup", large', "7"), ("3.png", "", "é|b")]
CELLS = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]


def text(delimiter: str = ",", end: str = "\n") -> str:
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in ROWS]
    return end.join(delimiter.join(row) for row in [COLUMNS, *quoted]) + end


def write(folder: Path, content: bytes | str, name: str = "labels.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, **reading: str) -> Table:
    return read_table(path, "--labels", reading=TableOptions(**reading))


def refusal(path: Path, **reading: str) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **reading)
    assert str(path.name) in str(caught.value) or "`encoding`" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("delimiter", "said"), [(",", ""), (";", "semicolons"), ("\t", "tabs"), ("|", "bars")]
)
def test_what_separates_columns_is_recognised_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, delimiter: str, said: str, end: str
) -> None:
    table = read(write(tmp_path, text(delimiter, end)))
    assert table.columns == COLUMNS
    assert [cells for _, cells in table.rows] == CELLS
    assert [number for number, _ in table.rows] == [2, 3, 4]
    assert caplog.messages == ([f"labels.csv: columns are separated by {said}"] if said else [])


def test_excels_own_first_line_tells_the_separator(tmp_path: Path) -> None:
    table = read(write(tmp_path, "sep=;\nfile;labels\n1.png;a,b,c,d\n"))
    assert table.rows == [(2, {"file": "1.png", "labels": "a,b,c,d"})]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_read_with_or_without_its_mark(tmp_path: Path, encoding: str) -> None:
    assert [cells for _, cells in read(write(tmp_path, text().encode(encoding))).rows] == CELLS


def test_other_encodings_are_asked_for_and_given_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, text().encode("cp1252"))
    assert "line 2 is not UTF-8 text (byte 0xFC): give its `encoding`, such as cp1252" in refusal(path)
    assert [cells for _, cells in read(path, encoding="cp1252").rows] == CELLS
    assert "`encoding` is 'cp-nonsense'" in refusal(path, encoding="cp-nonsense")
    assert "`encoding` is 'zip'" in refusal(path, encoding="zip")
    bare = write(tmp_path, text().encode("utf-16-le"))
    assert "line 1 contains a NUL character" in refusal(bare)
    assert [cells for _, cells in read(bare, encoding="utf-16-le").rows] == CELLS


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is empty: expected a header line"),
        (" \n1.png\n", "is empty: expected a header line"),
        ("file,labels,labels\n1.png,a,b\n", "has two columns 'labels': rename or remove one"),
        ("file, labels,labels \n1.png,a,b\n", "has two columns 'labels'"),
        ('file,labels\n1.png,"a\n2.png,b\n', "row 2: the quote opened on line 2 is not closed"),
        ('file,labels\n1.png,"a\n2.png,"b"\n3.png,c\n', "row 2: the quote opened on line 2 is not closed"),
        (b"file,labels\n1.png,a\0b\n", "line 2 contains a NUL character"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(
    tmp_path: Path, content: str | bytes, complaint: str
) -> None:
    assert complaint in refusal(write(tmp_path, content))


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    table = read(write(tmp_path, "file,label\n1.png,a\n"))
    with pytest.raises(BadDataError, match=r"no column 'labels' \(`labels_column`\): did you mean 'label'\?"):
        table.check_columns([("`image_column`", "file"), ("`x`", None), ("`labels_column`", "labels")])


def test_a_row_that_does_not_fit_its_header_is_left_out_and_counted_or_stops_a_strict_reading(
    tmp_path: Path,
) -> None:
    rows = ["1.png,a", "2.png,a,b", "3.png", '4.png,"a"b', ",", "", "5.png,b"]
    path, skipped = write(tmp_path, "\n".join(["file,labels", *rows])), Skipped()
    table = read_table(path, "--labels", skipped)
    assert [cells["file"] for _, cells in table.rows] == ["1.png", "5.png"]
    assert skipped.summary() == (
        "left out 3 of 5 rows: 1 row with more cells than columns, 1 row with fewer cells than columns, "
        "1 row with stray quotes"
    )
    assert "row 3 has 3 cells, expected 2" in refusal(path)
    assert not [line for line in skipped.lines() if ".png" in line]


def excel(folder: Path, sheets: dict[str, list[list[object]]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    path = folder / "labels.xlsx"
    book.save(path)
    return path


def test_a_workbook_gives_its_first_sheet_and_names_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = [["file", "dr", "patient"], ["1.png", 1, 7.0], ["2.png", None, True]]
    path = excel(tmp_path, {"README": [["About"], ["legend"]], "Data": data})
    about = read(path)
    assert (about.sheet, about.others) == ("README", ("Data",))
    assert "sheet 'README' is read, not 'Data' (`sheet` chooses)" in "\n".join(caplog.messages)
    with pytest.raises(BadDataError, match=r"that is sheet 'README', `sheet` chooses another: Data"):
        about.check_columns([("--image-column", "file")])
    table = read(path, sheet="Data")
    assert table.rows == [
        (2, {"file": "1.png", "dr": "1", "patient": "7"}),
        (3, {"file": "2.png", "dr": "", "patient": "True"}),
    ]
    assert "did you mean 'Data'" in refusal(path, sheet="data")
    assert "`encoding` has no effect" in refusal(path, encoding="cp1252")
    assert "`sheet` has no effect" in refusal(write(tmp_path, text()), sheet="Data")
    renamed = path.rename(tmp_path / "labels.csv")
    assert read(renamed, sheet="Data").rows == table.rows, "told by content, not by name"


def test_a_damaged_workbook_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    path = excel(tmp_path, {"Data": [["file"], ["1.png"]]})
    whole = path.read_bytes()
    assert "damaged or locked Excel workbook" in refusal(
        write(tmp_path, whole[: len(whole) // 2], "half.xlsx")
    )


def test_an_old_workbook_is_read_where_that_is_installed_and_else_told_how_to(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "old.xls")
    said = refusal(path)
    assert "pip install 'mgll-mllm[excel]'" in said or "damaged or locked Excel workbook" in said


def test_parquet_is_read_too(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "labels.parquet"
    rows = [
        {"file": "1.png", "labels": ["a", "b"], "dr": True},
        {"file": "2.png", "labels": None, "dr": False},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    assert [cells for _, cells in read(path).rows] == [
        {"file": "1.png", "labels": '["a", "b"]', "dr": "True"}, {"file": "2.png", "labels": "", "dr": "False"},
    ]  # fmt: skip
    whole = path.read_bytes()
    assert "is damaged Parquet" in refusal(write(tmp_path, whole[:-30], "half.parquet"))
