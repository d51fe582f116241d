"""A label table of any supported form is read alike by probe, data fundus and eval-mcq build."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from eval_mcq.items.schema import load_bench
from mgll_encoder.cli import main
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.table_options import reading
from mgll_encoder.data.manifest import read_header, read_rows
from mgll_encoder.probing.labeled_set import LabeledSet
from tests.builders import invoke, picture, refused

NAMES = ("cataract", "glaucoma", "myopia", "normal")
TRUTH = [("normal",), ("glaucoma",), ("cataract",), ("myopia",), ("glaucoma", "myopia")] * 4
FILES = [f"{i}.png" for i in range(len(TRUTH))]
WHOLE = Counter(name for names in TRUTH for name in names)


@dataclass(frozen=True)
class Kind:
    """A kind of table.

    Attributes:
        content: Its text or bytes.
        options: Options needed to read it.
        left_out: Row counts by reason.
        labels: How often each label is then true.
        uncertain: Uncertain cells.
    """

    content: str | bytes
    options: Mapping[str, str]
    left_out: Mapping[str, int]
    labels: Mapping[str, int]
    uncertain: int = 0


def listing(cell: Callable[[tuple[str, ...]], str], delimiter: str = ",", *more: str) -> str:
    rows = [f'{file}{delimiter}"{cell(names)}"' for file, names in zip(FILES, TRUTH, strict=True)]
    return "\n".join([f"file{delimiter}labels", *rows, *more]) + "\n"


def matrix(true: str, false: str, open_: Mapping[tuple[int, str], str] | None = None, *more: str) -> str:
    rows = []
    for i, names in enumerate(TRUTH):
        cells = [(open_ or {}).get((i, name), true if name in names else false) for name in NAMES]
        rows.append(",".join([FILES[i], *cells]))
    return "\n".join([",".join(["file", *NAMES]), *rows, *more]) + "\n"


def semicolons(names: tuple[str, ...]) -> str:
    return "; ".join(names)


BINARY = {"binary_columns": ",".join(NAMES)}
OPEN = {(0, "glaucoma"): "-1", (0, "myopia"): "uncertain", (1, "myopia"): "-1.0", (2, "glaucoma"): "nan"}
ALL_OPEN = {(5, name): "-1" for name in NAMES}

KINDS = {
    "plain": Kind(listing(semicolons), {}, {}, WHOLE),
    "bars": Kind(listing("|".join), {}, {}, WHOLE),
    "commas in cells": Kind(listing(", ".join), {}, {}, WHOLE),
    "slashes, as asked": Kind(listing("/".join), {"label_separator": "/"}, {}, WHOLE),
    "Python lists": Kind(listing(lambda names: str(list(names))), {}, {}, WHOLE),
    "JSON lists": Kind(listing(lambda names: json.dumps(names).replace('"', '""')), {}, {}, WHOLE),
    "semicolons between columns": Kind(listing(semicolons, ";"), {}, {}, WHOLE),
    "tabs": Kind(listing(semicolons, "\t"), {}, {}, WHOLE),
    "capitals and blanks": Kind(listing(lambda names: f" {semicolons(names).upper()} "), {}, {}, WHOLE),
    "UTF-16": Kind(listing(semicolons).encode("utf-16"), {}, {}, WHOLE),
    "cp1252": Kind(
        listing(semicolons).replace("\n", ",é\n").replace("labels,é", "labels,remark").encode("cp1252"),
        {"encoding": "cp1252"}, {}, WHOLE,
    ),
    "0 and 1": Kind(matrix("1", "0"), BINARY, {}, WHOLE),
    "floats": Kind(matrix("1.0", "0.0"), BINARY, {}, WHOLE),
    "yes and no": Kind(matrix("Yes", "No"), BINARY, {}, WHOLE),
    "true and false": Kind(matrix("TRUE", "false"), BINARY, {}, WHOLE),
    "blank for not": Kind(matrix("1", ""), BINARY, {}, WHOLE),
    "open cells": Kind(matrix("1", "0", OPEN), BINARY, {}, WHOLE, 4),
    "open cells, negative": Kind(matrix("1", "0", OPEN), {**BINARY, "uncertain": "negative"}, {}, WHOLE, 4),
    "open rows": Kind(
        matrix("1", "0", ALL_OPEN), BINARY, {"uncertain label": 1}, WHOLE - Counter({"normal": 1})
    ),
    "a cell nobody understands": Kind(
        matrix("1", "0", {(3, "normal"): "perhaps"}), BINARY, {"cell that cannot be read": 1},
        WHOLE - Counter({"myopia": 1}),
    ),
    "nan for no label": Kind(
        listing(semicolons, ",", "20.png,nan", "21.png,", "22.png,unknown"), {}, {"no label": 3}, WHOLE
    ),
    "images that are not there": Kind(
        listing(semicolons, ",", "gone.png,normal", "../gone.png,myopia"), {}, {"no image file": 2}, WHOLE
    ),
    "no image named": Kind(listing(semicolons, ",", ",normal"), {}, {"no image named": 1}, WHOLE),
    "twice": Kind(listing(semicolons, ",", "0.png,Normal"), {}, {"image listed twice": 1}, WHOLE),
    "twice, in two ways": Kind(
        listing(semicolons, ",", "0.png,myopia"), {}, {"rows of one image disagree": 2},
        WHOLE - Counter({"normal": 1}),
    ),
    "normal and diseased": Kind(
        listing(semicolons, ",", "20.png,normal;glaucoma"), {}, {"normal and diseased": 1}, WHOLE
    ),
    "open cells, positive": Kind(
        matrix("1", "0", {(1, "myopia"): "-1", (0, "myopia"): "-1"}), {**BINARY, "uncertain": "positive"},
        {"normal and diseased": 1}, WHOLE + Counter({"myopia": 1}) - Counter({"normal": 1}), 2,
    ),
    "ragged": Kind(
        listing(semicolons, ",", "20.png,normal,myopia", "20.png"), {},
        {"row with more cells than columns": 1, "row with fewer cells than columns": 1}, WHOLE,
    ),
}  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for file in (*FILES, "20.png", "21.png", "22.png"):
        picture(tmp_path / "images", file)
    preset = {
        "name": "few", "question": "What is seen?", "options": 2, "other_labels": ["normal"],
        "diseases": [{"name": name, "option": name, "labels": [name]} for name in NAMES[:3]],
    }  # fmt: skip
    (tmp_path / "few.json").write_text(json.dumps(preset))
    return tmp_path / "images"


def arguments(options: Mapping[str, str]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]


def summary(skipped: Skipped) -> tuple[dict[str, int], int]:
    return dict(skipped.counts), skipped.uncertain.total()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_three_commands_read_a_table_alike(eval_mcq, images: Path, tmp_path: Path, kind: Kind) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes(kind.content.encode() if isinstance(kind.content, str) else kind.content)
    options = arguments(kind.options)
    left_out = dict(kind.left_out)

    skipped = Skipped()
    given = {"encoding": None, "sheet": None, "label_separator": None, "uncertain": "ignore", **kind.options}
    binary = given.pop("binary_columns", "")
    question = LabeledSet(table, images, binary_columns=binary, reading=reading(**given))  # type: ignore[arg-type]
    found = question.read(skipped, both_sides=False)
    labels = dict(zip(found.names, found.truth.sum(axis=0).tolist(), strict=True))
    assert labels == kind.labels
    assert summary(skipped) == (left_out, kind.uncertain)

    out = tmp_path / "m.jsonl"
    fundus = ("data", "fundus", "--labels", table, "--images", images, "--patient-column", "file")
    done = invoke(main, *fundus, "--out", out, *options)
    assert done.code == 0, done.err
    manifest = Counter(label for _, _, row in read_rows(out) for label in row.texts["disease"])
    assert manifest == kind.labels
    built = read_header(out).built
    assert built["skipped"] == left_out
    assert sum(dict(built.get("uncertain_cells", {})).values()) == kind.uncertain

    out = tmp_path / "b.jsonl"
    call = ("build", "--labels", table, "--images", images, "--preset", tmp_path / "few.json", *options)
    assert eval_mcq(*call, "--out", out) == 0, eval_mcq.err
    bench = load_bench(out)
    asked = {name: count for name, count in kind.labels.items() if name != "normal"}
    assert Counter(item.category for item in bench.items) == asked
    assert bench.header.built["skipped"] == left_out
    said = [line for line in (done.err + eval_mcq.err).splitlines() if line.startswith("left out")]
    assert len(said) == (2 if left_out else 0)
    assert len(set(said)) <= 1, "both say it in the same words"


def test_all_three_refuse_alike(eval_mcq, images: Path, tmp_path: Path) -> None:
    """A class that consists of two others, duplicate columns, columns of another sheet."""
    table, out = tmp_path / "labels.csv", tmp_path / "x.jsonl"
    probe = ("probe", "--encoder", tmp_path, "--labels", table, "--images", images)
    fundus = (
        "data",
        "fundus",
        "--labels",
        table,
        "--images",
        images,
        "--patient-column",
        "file",
        "--out",
        out,
    )
    build = ("build", "--labels", table, "--images", images, "--preset", tmp_path / "few.json", "--out", out)

    def everywhere(complaint: str, *options: str) -> None:
        said = [
            refused(main, *probe, *options),
            refused(main, *fundus, *options),
            eval_mcq.refuses(*build, *options),
        ]
        assert [complaint in line for line in said] == [True] * 3, said
        assert not out.exists()

    table.write_text(listing(semicolons, ",", "20.png,normal and glaucoma"))
    everywhere("'normal and glaucoma' consists of other labels of the table: give --label-separator 'and'")
    table.write_text(listing(semicolons, ",", '20.png,"glaucoma, drusen"', '21.png,"normal, myopia"'))
    everywhere(
        "'normal, myopia' consists of other labels of the table, but 'glaucoma, drusen' does not: "
        "give --label-separator ','"
    )
    table.write_text(listing(semicolons).replace("file,labels", "file,file", 1))
    everywhere("has two columns 'file'")
    table.write_text(matrix("1", "0"))
    everywhere("--label-separator has no effect", "--label-separator", ",", "--binary-columns", "myopia")
    table.write_text(matrix("1", "0", {(4, "myopia"): "perhaps"}))
    everywhere(
        "row 6: column 'myopia' is 'perhaps': expected 1, 0, yes", "--binary-columns", "myopia", "--strict"
    )


def test_a_row_that_is_all_open_is_denied_everything_where_the_user_says_so(
    images: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.csv").write_text(matrix("1", "0", ALL_OPEN))
    skipped, asked = Skipped(), reading(None, None, None, "negative")
    question = LabeledSet(tmp_path / "labels.csv", images, binary_columns=",".join(NAMES), reading=asked)
    found = question.read(skipped, both_sides=False)
    assert (len(found.images), found.known, skipped.total, skipped.uncertain) == (
        20,
        None,
        0,
        {"negative": 4},
    )
    assert found.truth.sum(axis=1).tolist().count(0) == 1
