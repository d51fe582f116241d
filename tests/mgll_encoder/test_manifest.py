import json
from pathlib import Path

import pytest

from mgll_encoder.common.errors import UserError
from mgll_encoder.data.manifest import (
    ManifestHeader,
    ManifestRow,
    image_folder,
    manifest_text,
    read_header,
    read_rows,
    row_at,
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
    path.write_text(
        manifest_text(path, tmp_path / "images", ManifestHeader(granularities=["status", "disease"]), rows)
    )
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
    with pytest.raises(UserError, match=complaint):
        list(read_rows(write(tmp_path, HEADER, ROW, line)))


def test_blank_lines_are_allowed(tmp_path):
    assert len(list(read_rows(write(tmp_path, HEADER, ROW, "\n", ROW)))) == 2


@pytest.mark.parametrize(
    "first", [ROW, "file,labels\n", {**HEADER, "version": 2}, {**HEADER, "granularities": []}]
)
def test_a_file_that_is_no_manifest_says_so(tmp_path, first):
    with pytest.raises(UserError, match="line 1 is no manifest header"):
        read_header(write(tmp_path, first, ROW))


def test_a_missing_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="mgll-encoder data fundus"):
        read_header(tmp_path / "none.jsonl")
