"""A user forgets --patient-column in one of two commands: both make the same split, or stop."""

import csv
import json
from pathlib import Path

import pytest

from eval_mcq.cli.main import main as eval_mcq
from mgll_encoder.cli import main as mgll_encoder
from tests.builders import invoke, picture, refused

LABELS = ("age-related macular degeneration", "cataract", "diabetic retinopathy", "glaucoma")


def table(folder: Path, *names: str) -> Path:
    """Forty patients with two eyes each; ``names`` are the columns that hold the patient."""
    rows = []
    for i in range(80):
        name = picture(folder, f"{i}.png", (3 * i, 10, 200 - i)).name
        rows.append({"file": name, "labels": LABELS[i % 4], **dict.fromkeys(names, f"p{i // 2}")})
    path = folder / "labels.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def manifest(labels: Path, *options: str) -> tuple[object, ...]:
    out = labels.with_name("manifest.jsonl")
    return (
        mgll_encoder,
        "data",
        "fundus",
        "--labels",
        labels,
        "--images",
        labels.parent,
        "--out",
        out,
        "--force",
        *options,
    )


def bench(labels: Path, *options: str) -> tuple[object, ...]:
    out = labels.with_name("bench.jsonl")
    return (
        eval_mcq, "build", "--labels", labels, "--images", labels.parent, "--split", "test", "--out", out, "--force",
        "--diseases", "AMD,Cataract,DR,Glaucoma", *options,
    )  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["patient_or_source_id", "patient", "Patient ID", "subject-id"])
def test_both_commands_recognize_the_column_and_their_sides_agree(tmp_path, name):
    labels = table(tmp_path, name)
    for command in (manifest(labels), bench(labels)):
        done = invoke(*command)
        assert done.code == 0, done.err
        assert done.err.count(f"labels.csv: patients are identified by column '{name}'") == 1
    (head, *rows), (built, *items) = lines(tmp_path / "manifest.jsonl"), lines(tmp_path / "bench.jsonl")
    trained = {row["image"]: row["patient"] for row in rows if row["split"] == "train"}
    asked = {item["images"][0]: item["patient"] for item in items}
    assert trained
    assert asked
    assert not trained.keys() & asked.keys()
    assert not set(trained.values()) & set(asked.values())
    assert {row["patient"] for row in rows} >= set(asked.values()), "one key, one pseudonym"
    assert head["built"]["split_by"] == built["built"]["split_by"] == "patient"


def test_without_such_a_column_none_goes_on_before_that_is_said(tmp_path):
    labels = table(tmp_path, "who")
    for command in (manifest(labels), bench(labels)):
        message = refused(*command)
        assert "no column is known to identify the patient" in message
        assert "--patient-column none" in message
    for options in (("--patient-column", "who"), ("--patient-column", "none")):
        for command in (manifest(labels, *options), bench(labels, *options)):
            done = invoke(*command)
            assert done.code == 0, done.err
    assert lines(tmp_path / "manifest.jsonl")[0]["built"]["split_by"] == "image"
    assert lines(tmp_path / "bench.jsonl")[0]["built"]["split_by"] == "image"


def test_no_patients_are_needed_where_nothing_is_split(tmp_path):
    labels = table(tmp_path)
    assert invoke(*manifest(labels, "--test-share", "0")).code == 0
    assert invoke(*bench(labels, "--split", "all")).code == 0


def test_of_several_such_columns_one_must_be_chosen(tmp_path):
    labels = table(tmp_path, "patient", "subject")
    for command in (manifest(labels), bench(labels)):
        assert "columns 'patient', 'subject' may all identify the patient" in refused(*command)
    assert invoke(*bench(labels, "--patient-column", "subject")).code == 0
