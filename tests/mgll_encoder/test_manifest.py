import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from mgll_encoder.common.errors import BadDataError, NotFoundError, UserError
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.data.caption_dataset import described_images
from mgll_encoder.data.manifest import (
    ManifestHeader,
    ManifestRow,
    image_folder,
    read_header,
    read_rows,
    row_at,
    write_manifest,
)

HEADER = {
    "format": "mgll-manifest",
    "version": 1,
    "granularities": ["status", "disease"],
    "images": "pictures",
}
ROW = {
    "image": "1.png",
    "texts": {"status": ["normal fundus"]},
    "patient": "7",
    "split": "train",
    "source": "ours",
}


def write(folder: Path, *lines: object) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_what_is_written_is_read_back_and_found_again_by_offset(tmp_path):
    rows = [
        ManifestRow(image=f"é{i}.png", texts={"status": ["normal"], "disease": ["a", "b"]}) for i in range(3)
    ]
    path = tmp_path / "sets" / "manifest.jsonl"
    path.parent.mkdir()
    write_manifest(path, tmp_path / "images", ManifestHeader(granularities=["status", "disease"]), rows)
    header = read_header(path)
    assert image_folder(path, header).resolve() == tmp_path / "images"
    read = list(read_rows(path))
    assert [row for _, _, row in read] == rows
    assert [number for number, _, _ in read] == [2, 3, 4]
    assert [row_at(path, offset) for _, offset, _ in read] == rows


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({**ROW, "texts": {"status": [" "]}}, r"line 3: 'texts.status.0': .*at least 1 character"),
        ({**ROW, "texts": {"status": []}}, "line 3: granularity 'status' has no text"),
        (
            {**ROW, "texts": {"diseases": ["x"]}},
            "line 3: unknown granularity 'diseases': did you mean 'disease'",
        ),
        ({**ROW, "texts": {}}, "line 3: 'texts'"),
        ({**ROW, "image": ""}, "line 3: 'image'"),
        ({**ROW, "split": "exam"}, "line 3: 'split': .*'train', 'val' or 'test'.*found \"exam\""),
        ({**ROW, "label": "x"}, "line 3: 'label': Extra inputs"),
        ('{"image": \n', "line 3: 'line': Invalid JSON"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, complaint):
    with pytest.raises(BadDataError, match=complaint):
        list(read_rows(write(tmp_path, HEADER, ROW, line)))


def parquet_and_lines(folder: Path, rows: list[ManifestRow]) -> tuple[Path, Path]:
    header = ManifestHeader(granularities=["status", "disease"])
    paths = (folder / "m.parquet", folder / "m.jsonl")
    for path in paths:
        write_manifest(path, folder / "images", header, rows)
    return paths


def test_parquet_and_json_lines_hold_the_same(tmp_path):
    rows = [
        ManifestRow(
            image=f"é{i}.png",
            texts={"status": [f"n {i}"], **({"disease": ["a", "b"]} if i % 3 else {})},
            split="val",
        )
        for i in range(1300)  # three groups of rows
    ]
    columns, lines = parquet_and_lines(tmp_path, rows)
    assert read_header(columns) == read_header(lines)
    assert [row for _, _, row in read_rows(columns)] == [row for _, _, row in read_rows(lines)] == rows
    assert [number for number, _, _ in read_rows(columns)] == list(range(1, 1301))
    places = [place for _, place, _ in read_rows(columns)]
    for i in (1299, 0, 512, 511, 700, 1):
        assert row_at(columns, places[i]) == rows[i]
    write_manifest(
        tmp_path / "back.jsonl",
        tmp_path / "images",
        read_header(columns),
        (r for _, _, r in read_rows(columns)),
    )
    assert (tmp_path / "back.jsonl").read_bytes() == lines.read_bytes()


def test_tables_that_others_wrote_are_read(tmp_path):
    """Texts as a struct, empty cells, one group of rows, as pandas writes them."""
    rows = [{**ROW, "patient": None}, {**ROW, "texts": {"status": None, "disease": ["x"]}}]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"mgll-manifest": json.dumps(HEADER)})
    parquet.write_table(table, tmp_path / "m.parquet")
    read = [row for _, _, row in read_rows(tmp_path / "m.parquet")]
    assert [row.texts for row in read] == [ROW["texts"], {"disease": ["x"]}]
    assert read[0].patient == ""


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {**ROW, "texts": {"diseases": ["x"]}},
            "row 2: unknown granularity 'diseases': did you mean 'disease'",
        ),
        ({**ROW, "texts": {"status": [" "]}}, r"row 2: 'texts.status.0': .*at least 1 character"),
        ({**ROW, "image": None}, "row 2: 'image': Field required"),
        ({**ROW, "label": "x"}, "row 2: 'label': Extra inputs"),
    ],
)
def test_a_bad_row_of_a_table_is_named_and_can_be_skipped(tmp_path, row, complaint):
    texts = pa.array(
        [list(r["texts"].items()) for r in (ROW, row)], pa.map_(pa.string(), pa.list_(pa.string()))
    )
    columns = {name: [r.get(name) for r in (ROW, row)] for name in row if name != "texts"}
    table = pa.table({**columns, "texts": texts}).replace_schema_metadata(
        {"mgll-manifest": json.dumps(HEADER)}
    )
    parquet.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(BadDataError, match=complaint):
        list(read_rows(tmp_path / "m.parquet"))
    skipped = Skipped()
    assert [row.image for _, _, row in read_rows(tmp_path / "m.parquet", skipped)] == ["1.png"]
    assert skipped.counts == {"line is not a row": 1}


def test_a_table_without_a_header_and_a_file_that_is_no_table_say_so(tmp_path):
    parquet.write_table(pa.Table.from_pylist([ROW]), tmp_path / "m.parquet")
    with pytest.raises(BadDataError, match="metadata is not a manifest header"):
        read_header(tmp_path / "m.parquet")
    (tmp_path / "x.parquet").write_text("{}")
    with pytest.raises(BadDataError, match=r"x.parquet is not a Parquet file"):
        read_header(tmp_path / "x.parquet")


def test_blank_lines_are_allowed(tmp_path):
    assert len(list(read_rows(write(tmp_path, HEADER, ROW, "\n", ROW)))) == 2


@pytest.mark.parametrize(
    "first", [ROW, "file,labels\n", {**HEADER, "version": 2}, {**HEADER, "granularities": []}]
)
def test_a_file_that_is_no_manifest_says_so(tmp_path, first):
    with pytest.raises(BadDataError, match="line 1 is not a manifest header"):
        read_header(write(tmp_path, first, ROW))


def test_a_missing_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(NotFoundError, match=r"`build_fundus\(\)`"):
        read_header(tmp_path / "none.jsonl")


def test_the_content_tells_a_table_from_lines_whatever_the_name(tmp_path):
    (tmp_path / "m").write_bytes(parquet_of(tmp_path, ROW, {**ROW, "image": "2.png"}))
    assert [row.image for _, _, row in read_rows(tmp_path / "m")] == ["1.png", "2.png"]


def test_a_table_damaged_anywhere_is_one_line(tmp_path):
    """One byte is changed at every position in turn: the file is read, or refused in one line."""
    whole, path = (
        parquet_of(tmp_path, *({**ROW, "image": f"{i}.png"} for i in range(50))),
        tmp_path / "d.parquet",
    )
    refusals = set()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            list(read_rows(path, Skipped()))
        except UserError as error:
            refusals.add(str(error).partition("(")[0])
    assert refusals >= {f"manifest {path} is damaged Parquet "}


def test_a_file_name_that_no_file_can_have_is_no_file(tmp_path):
    path = write(tmp_path, HEADER, {**ROW, "image": "x" * 300 + ".png"}, {**ROW, "image": "a\0b.png"})
    skipped = Skipped()
    with pytest.raises(BadDataError, match="has no usable image"):
        described_images(path, tmp_path, "train", (), skipped)
    assert skipped.counts == {"no image file": 2}


def test_a_message_about_a_row_shows_no_patient(tmp_path):
    rows = [
        {**ROW, "image": ["Doe_Jane.png"]},
        {**ROW, "patient": ["Doe"]},
        {**ROW, "Doe": "Doe"},
        "Doe, Jane",
    ]
    for row in rows:
        with pytest.raises(BadDataError) as caught:
            list(read_rows(write(tmp_path, HEADER, row)))
        assert "line 2" in str(caught.value)
        assert "Doe" not in str(caught.value).replace("'Doe': Extra inputs", "")


def parquet_of(folder, *rows):
    texts = pa.array(
        [list(row["texts"].items()) for row in rows], pa.map_(pa.string(), pa.list_(pa.string()))
    )
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "texts"}
    table = pa.table({**columns, "texts": texts}).replace_schema_metadata(
        {"mgll-manifest": json.dumps(HEADER)}
    )
    parquet.write_table(table, folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()
