import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mgll_encoder.cli.data import app
from mgll_encoder.common.errors import BadDataError, UserError
from mgll_encoder.common.skipped import DISAGREE
from mgll_encoder.common.splits import assign_split
from mgll_encoder.data.fundus import EXPLANATIONS, FundusTable, build_fundus, read_explanations
from mgll_encoder.data.manifest import image_folder, read_header, read_rows
from mgll_encoder.data.phantom.findings import FINDINGS
from tests.builders import picture

COLUMNS = ("file", "labels", "patient_or_source_id", "raw_label_or_keywords", "dataset")
GOOD = [
    ("1.png", "normal", "a", "normal fundus", "X"),
    (
        "2.png",
        "Glaucoma; diabetic  retinopathy",
        "b",
        "glaucoma，severe nonproliferative retinopathy，lens dust",
        "X",
    ),
    ("3.png", "myopia", "c", "P: pathologic myopia", "Y"),
    ("4.png", "diabetic retinopathy", "c", "boxes: hard_exudates=6, haemorrhages/microaneurysms=0", "Y"),
    ("5.png", "cataract", "d", "cataract,suspected glaucoma", "X"),
]


def table(folder: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> Path:
    for row in rows:
        if row[0].endswith(".png"):
            picture(folder, row[0])
    path = folder / "labels.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


def texts_of(manifest: Path) -> dict[str, dict[str, list[str]]]:
    return {row.image: row.texts for _, _, row in read_rows(manifest)}


def test_labels_become_four_granularities(tmp_path):
    out = tmp_path / "m.jsonl"
    build_fundus(FundusTable(table(tmp_path, GOOD)), tmp_path, out)
    texts, known = texts_of(out), read_explanations().explanations
    assert read_header(out).granularities == ["status", "disease", "keyword", "explanation"]
    assert texts["1.png"]["status"] == ["normal fundus"]
    assert "keyword" not in texts["1.png"]
    assert texts["2.png"] == {
        "status": ["abnormal fundus"],
        "disease": ["diabetic retinopathy", "glaucoma"],
        "keyword": ["glaucoma", "severe nonproliferative retinopathy"],
        "explanation": [known["diabetic retinopathy"], known["glaucoma"]],
    }
    assert texts["3.png"]["keyword"] == ["pathologic myopia"]
    assert "keyword" not in texts["4.png"]
    assert texts["5.png"]["keyword"] == ["cataract"]


def test_the_split_is_by_patient_and_the_one_of_every_command(tmp_path):
    rows = [(f"{i}.png", "normal", f"p{i // 2}", "", "X") for i in range(40)]
    report = build_fundus(FundusTable(table(tmp_path, rows)), tmp_path, tmp_path / "m.jsonl")
    sides = {row.image: row.split for _, _, row in read_rows(tmp_path / "m.jsonl")}
    assert sides == {f"{i}.png": assign_split(f"p{i // 2}") for i in range(40)}
    assert report.splits["test"] + report.splits["train"] == 40
    assert min(report.splits.values()) > 0


def test_what_is_unknown_contradictory_or_broken_is_left_out_and_counted(tmp_path):
    bad = [
        ("6.png", "", "e", "suspected glaucoma", "X"),
        ("7.png", "normal;glaucoma", "f", "", "X"),
        ("8.png", "glaucoma", "g", "", "X"),
        ("8.png", "myopia", "g", "", "X"),
        ("3.png", "Myopia", "c", "", "Y"),
        ("gone.jpg", "myopia", "h", "", "X"),
        ("broken.jpg", "myopia", "h", "", "X"),
        ("", "myopia", "h", "", "X"),
    ]
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    path = table(tmp_path, GOOD + bad)
    report = build_fundus(FundusTable(path), tmp_path, tmp_path / "m.jsonl")
    assert list(texts_of(tmp_path / "m.jsonl")) == [row[0] for row in GOOD]
    assert report.skipped.counts == {
        "no label": 1, "normal and diseased": 1, "rows of one image disagree": 2,
        "image listed twice": 1, "no image file": 1, "image unreadable": 1, "no image named": 1,
    }  # fmt: skip
    assert report.skipped.first[DISAGREE] == (
        f"label file {path} row 9: labels of the image differ from those of label file {path} row 10"
    )
    for row, complaint in zip(
        bad, ["row 7", "row 7", "row 7", None, "row 7", "row 7", "row 7", "row 7"], strict=True
    ):
        rows = [*GOOD, row] + ([bad[3]] if row[1] == "glaucoma" else [])
        if complaint:
            with pytest.raises(BadDataError, match=complaint):
                build_fundus(
                    FundusTable(table(tmp_path, rows)), tmp_path, tmp_path / "strict.jsonl", strict=True
                )
    assert not (tmp_path / "strict.jsonl").exists()


def test_a_missing_column_names_those_that_are_there(tmp_path):
    path = table(tmp_path, [row[:2] for row in GOOD], ("name", "labels"))
    with pytest.raises(
        BadDataError, match=r"no column 'file' \(`image_column`\): its columns are name, labels"
    ):
        build_fundus(FundusTable(path), tmp_path, tmp_path / "m.jsonl")
    with pytest.raises(BadDataError, match=r"no column 'words' \(`keywords_column`\)"):
        build_fundus(
            FundusTable(path, image="name", patient="name", keywords="words"), tmp_path, tmp_path / "m.jsonl"
        )


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path):
    path = table(tmp_path, [("1.png", "", "a", "", "X")])
    with pytest.raises(BadDataError, match=r"has no usable image: .*left out 1 of 1 rows: 1 no label"):
        build_fundus(FundusTable(path), tmp_path, tmp_path / "m.jsonl")
    assert not (tmp_path / "m.jsonl").exists()


def test_every_label_of_the_phantom_has_an_explanation_and_every_file_its_sources():
    known = read_explanations()
    assert known.sources
    assert {"normal", *FINDINGS} <= set(known.explanations)
    assert len(set(known.explanations.values())) == len(known.explanations)


def test_your_own_explanations_are_used_and_checked(tmp_path):
    own = tmp_path / "own.json"
    own.write_text('{"version": 3, "sources": ["us"], "explanations": {"glaucoma": "a big cup"}}')
    report = build_fundus(
        FundusTable(table(tmp_path, GOOD)), tmp_path, tmp_path / "m.jsonl", explanations=own
    )
    assert texts_of(tmp_path / "m.jsonl")["2.png"]["explanation"] == ["a big cup"]
    assert report.unexplained == {"diabetic retinopathy": 2, "normal": 1, "myopia": 1, "cataract": 1}
    own.write_text('{"version": 3}')
    with pytest.raises(BadDataError, match="'sources': Field required"):
        read_explanations(own)


def test_the_command_reports_and_says_what_to_do_next(tmp_path):
    path, out = table(tmp_path, [*GOOD, ("6.png", "odd thing", "", "", "X")]), tmp_path / "m.jsonl"
    arguments = ["fundus", "--labels", str(path), "--images", str(tmp_path), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "6 images" in said
    assert "odd thing (1)" in said
    assert "1 images have no patient id" in said
    assert "Next: mgll-encoder pretrain" in said
    assert isinstance(CliRunner().invoke(app, arguments).exception, UserError)  # it exists
    assert image_folder(out, read_header(out)).resolve() == tmp_path


def test_the_shipped_photographs_build(photographs, tmp_path):
    builds(photographs, tmp_path)


def test_the_real_table_builds(real_data, tmp_path):
    builds(real_data / "fundus", tmp_path)


def builds(folder: Path, tmp_path: Path) -> None:
    report = build_fundus(FundusTable(folder / "manifest.csv"), folder, tmp_path / "m.jsonl")
    with (folder / "manifest.csv").open(encoding="utf-8") as stream:
        labeled = [row for row in csv.DictReader(stream) if row["labels"]]
    assert report.rows == len(labeled) - report.skipped.total + report.skipped.counts["no label"]
    assert report.rows > 0.9 * len(labeled)
    assert not [
        text
        for texts in texts_of(tmp_path / "m.jsonl").values()
        for text in texts.get("keyword", [])
        if "=" in text
    ]
    assert EXPLANATIONS.is_file()
