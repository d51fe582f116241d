"""Every row of ``../shared/cases/README.md``: what it did, what it does now, and the test that holds its kind.

``python -m tests.test_cases`` prints the table. The rows are skipped where the folder is absent (``MGLL_CASES_DIR``).
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from eval_mcq.cli.main import main as eval_mcq
from eval_mcq.items.schema import load_bench
from mgll_encoder.cli import main as mgll_encoder
from mgll_encoder.common.images import open_image
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.table_options import reading
from mgll_encoder.common.tables import TableOptions
from mgll_encoder.data.manifest import read_rows
from mgll_encoder.probing.labeled_set import LabeledSet
from mllm_adapters.data.corpus import read_corpus
from tests import builders
from tests.mllm_adapters.llava_checkpoints import a_tower

README = "README.md"

Outcome = Callable[[Path, Path], str]
"""The case and an empty folder -> what is found, in words; asserts that it is what the README asks for."""


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        case: Path below the folder of cases.
        test: The test that holds its kind, on inputs of its own.
        outcome: What the case does now.
    """

    case: str
    test: str
    outcome: Outcome


# --- pictures, DICOM --------------------------------------------------------------------------------------------


def as_the_8_bit_original(case: Path, _: Path) -> str:
    found, original = (np.asarray(open_image(p)).astype(int) for p in (case, case.parent / "l.png"))
    away = int(np.abs(found - original).max())
    assert away <= 1
    return f"at most {away} of 255 from l.png"


def upright(case: Path, _: Path) -> str:
    assert open_image(case).size == (96, 160)
    return "96x160, upright"


def radiograph(case: Path, scratch: Path) -> str:
    done = builders.invoke(mgll_encoder, "data", "xray", "--dicom", case, "--out", scratch / "out")
    assert done.code == 0, done.err
    gray = np.asarray(Image.open(next((scratch / "out").rglob("*.png"))))
    low, high = np.percentile(gray, (1, 99))
    assert high - low > 200, "the whole scale is used"
    return f"grey values {gray.min()}..{gray.max()}, 98 % of them in {low:.0f}..{high:.0f}"


def no_contrast(case: Path, scratch: Path) -> str:
    done = builders.invoke(mgll_encoder, "data", "xray", "--dicom", case, "--out", scratch / "out")
    assert done.code == 2
    assert "no contrast" in done.err
    return _line(done.err)


# --- questions --------------------------------------------------------------------------------------------------


def imported(case: Path, scratch: Path) -> str:
    done = _import(case, scratch / "b.jsonl")
    assert done.code == 0, done.err
    options = load_bench(scratch / "b.jsonl").items[0].options
    assert not any(re.match(r"[A-D][.):]", option) for option in options)
    return f"read; options {', '.join(options)}"


def left_out(case: Path, scratch: Path) -> str:
    stopped = _import(case, scratch / "a.jsonl")
    assert stopped.code == 2
    kept = _import(case, scratch / "b.jsonl", "--skip-bad")
    if kept.code:  # a file of one row, which is bad
        assert kept.code == 2
        return f"refused: {_line(stopped.err)}; --skip-bad: {_line(kept.err)}"
    recorded = load_bench(scratch / "b.jsonl").header.built["skipped"]
    assert sum(recorded.values()) == 1
    return f"refused: {_line(stopped.err)}; --skip-bad leaves out {recorded}"


def _import(case: Path, out: Path, *options: str) -> builders.Outcome:
    kind = "omnimedvqa" if case.suffix == ".json" else "vlmevalkit"
    images = ("--images", case.parent) if case.suffix == ".json" else ()
    return builders.invoke(eval_mcq, "import", case, "--format", kind, *images, "--out", out, *options)


# --- label tables -----------------------------------------------------------------------------------------------


def table(**options: Any) -> Outcome:
    def three_commands(case: Path, scratch: Path) -> str:
        images = _images(scratch)
        given = {"encoding": None, "sheet": None, "label_separator": None, "uncertain": "ignore"}
        binary = _binary(case) if case.name.startswith("oh_") else ""
        typed = _typed({**options, **({"binary_columns": binary} if binary else {})})
        skipped = Skipped()
        asked = LabeledSet(case, images, binary_columns=binary, reading=_reading({**given, **options}))
        found = asked.read(skipped, both_sides=False)
        labels = dict(zip(found.names, map(int, found.truth.sum(axis=0)), strict=True))
        manifest, bench = scratch / "m.jsonl", scratch / "b.jsonl"
        fundus = ("data", "fundus", "--labels", case, "--images", images, "--patient-column", "file")
        made = builders.invoke(mgll_encoder, *fundus, "--out", manifest, *typed)
        assert made.code == 0, made.err
        rows = [row.texts["disease"] for _, _, row in read_rows(manifest)]
        assert {n: sum(n in row for row in rows) for n in labels} == labels
        build = ("build", "--labels", case, "--images", images, "--preset", "fundus10", "--out", bench)
        built = builders.invoke(eval_mcq, *build, *typed)
        assert built.code == 0, built.err
        counts = load_bench(bench).header.built["skipped"]
        assert counts == dict(skipped.counts)
        said = f"{len(rows)} images, {sum(labels.values())} labels by all three commands"
        said += "".join(f"; left out {n}: {why}" for why, n in counts.items())
        return said + (f"; {open_} uncertain cells" if (open_ := skipped.uncertain.total()) else "")

    return three_commands


def told(*words: str) -> Outcome:
    def by_all_three(case: Path, scratch: Path) -> str:
        images, out = _images(scratch), scratch / "x.jsonl"
        lines = [
            builders.refused(mgll_encoder, "probe", "--encoder", images, "--labels", case, "--images", images),
            builders.refused(
                mgll_encoder, "data", "fundus", "--labels", case, "--images", images, "--patient-column", "file",
                "--out", out,
            ),
            builders.refused(
                eval_mcq, "build", "--labels", case, "--images", images, "--preset", "fundus10", "--out", out
            ),
        ]  # fmt: skip
        assert all(word in line for line in lines for word in words), lines
        return f"refused: {lines[0]}"

    return by_all_three


def sheets(case: Path, scratch: Path) -> str:
    images = _images(scratch)
    refused = builders.invoke(
        mgll_encoder, "probe", "--encoder", images, "--labels", case, "--images", images
    )
    assert "--sheet" in refused.err
    return f"{_line(refused.err)}; {table(sheet='Data')(case, scratch)}"


def _images(scratch: Path) -> Path:
    for number in range(60):
        for side in ("left", "right"):
            builders.picture(scratch / "images", f"phantom-{number:05}_{side}.png")
    return scratch


def _binary(case: Path) -> str:
    columns = case.read_text(encoding="utf-8").splitlines()[0].split(",")
    return ",".join(name for name in columns if name not in ("file", "patient"))


def _typed(options: Mapping[str, str]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]


def _reading(given: Mapping[str, Any]) -> TableOptions:
    return reading(**given)


# --- conversations ----------------------------------------------------------------------------------------------


def rows(*images: int) -> Outcome:
    """Rows with so many images each."""

    def read(case: Path, scratch: Path) -> str:
        for name in ("images/phantom-00001_right.png", "a.jpg"):
            builders.picture((scratch / name).parent, Path(name).name)
        found = read_corpus(case, scratch).rows
        assert tuple(len(row.images) for row in found) == images
        turns = [message["role"] for message in found[0].messages()]
        return f"read: {len(found)} rows with {', '.join(map(str, images))} images; {', '.join(turns)}"

    return read


# --- weights ----------------------------------------------------------------------------------------------------


def inspected(case: Path, _: Path) -> str:
    done = builders.invoke(mgll_encoder, "inspect", case)
    assert done.code == 0, done.err
    return "read: " + " ".join(done.out.split("layout")[1].split("│")[1].split())


def named(*words: str) -> Outcome:
    def refused(case: Path, _: Path) -> str:
        line = builders.refused(mgll_encoder, "inspect", case)
        assert all(word in line for word in words), line
        return f"refused: {line}"

    return refused


def two_sets(_: Path, scratch: Path) -> str:
    torch.manual_seed(0)
    tower = a_tower(scratch / "tower")
    from safetensors.torch import load_file

    weights = load_file(tower / "model.safetensors")
    torch.save({"state_dict": weights, "state_dict_ema": weights}, scratch / "both.pt")
    said = builders.invoke(mgll_encoder, "inspect", scratch / "both.pt")
    assert "two sets of weights" in said.err
    chosen = builders.invoke(mgll_encoder, "inspect", scratch / "both.pt", "--weights", "ema")
    assert chosen.code == 0
    assert "two sets" not in chosen.err
    return "said: " + next(line for line in said.err.splitlines() if "two sets" in line)


# --- what fuzzing found -----------------------------------------------------------------------------------------

FUZZED = {
    "run": "runs", "manifest": "manifests", "preset": "presets", "recipe": "recipes", "train": "rows",
    "encoder": "weights", "json_misc": "presets",
}  # fmt: skip
"""Reader in the name of a case -> its name now, where it has another."""


def fuzzed(case: Path, scratch: Path) -> str:
    from tests.fuzz.harness import warm, worker_of
    from tests.fuzz.search import reader_of, replay

    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    warm()
    name = re.sub(r"^F2?_|_\d+$", "", case.name)
    damaged = Path(shutil.copytree(case, scratch / f"{FUZZED.get(name, name)}_1"))
    worker = worker_of(reader_of(damaged), scratch / "worker")
    try:
        verdicts = [verdict for _, _, verdict in replay(worker, damaged)]
    finally:
        worker.close()
    assert not [verdict for verdict in verdicts if verdict.kind == "finding"]
    return ", ".join(sorted({f"{verdict.kind}" for verdict in verdicts}))


# --- the table --------------------------------------------------------------------------------------------------

IMAGES = "tests/common/test_images.py::"
DEEP, TURNED = (
    f"{IMAGES}test_a_deep_picture_looks_as_its_8_bit_version",
    f"{IMAGES}test_exif_turns_a_picture_upright",
)
DICOM = "tests/mgll_encoder/test_dicom_pixels.py::test_the_cases"
FAULTS = "tests/eval_mcq/test_import_faults.py::"
LETTERS = f"{FAULTS}test_letters_that_options_carry_are_taken_off_and_that_is_said"
BAD_ROWS = f"{FAULTS}test_bad_rows_can_be_left_out_and_are_counted_and_recorded"
BAD_ENTRIES = f"{FAULTS}test_bad_entries_of_a_json_file_are_left_out_too"
ALIKE = "tests/eval_mcq/test_label_tables.py::test_three_commands_read_a_table_alike"
TABLES = "tests/common/test_tables.py::"
OLD = f"{TABLES}test_an_old_workbook_is_read_where_that_is_installed_and_else_told_how_to"
SHEETS = f"{TABLES}test_a_workbook_gives_its_first_sheet_and_names_the_others"
SHAPES = "tests/mllm_adapters/test_row_shapes.py::"
SAME = f"{SHAPES}test_rows_of_every_published_shape_are_the_same_conversation"
SYSTEM, BLANK = (
    f"{SHAPES}test_a_system_turn_is_read_wherever_it_stands",
    f"{SHAPES}test_a_blank_image_is_no_image",
)
WEIGHTS = "tests/mgll_encoder/test_weight_files.py::"
ZERO = f"{WEIGHTS}test_a_shard_of_zero_3_is_named_with_the_command_that_consolidates"
POINTER = f"{WEIGHTS}test_a_pointer_of_git_lfs_is_called_by_its_name"
BESIDE = f"{WEIGHTS}test_what_training_scripts_keep_beside_the_weights_is_skipped"
ARCHIVE = f"{WEIGHTS}test_a_torchscript_archive_is_read_without_its_code"
SETS = f"{WEIGHTS}test_two_sets_of_weights_are_said_until_one_is_chosen"
CORPUS = "tests/fuzz/test_fuzz.py::test_what_was_found_once_is_not_found_again"
TWICE = "tests/eval_mcq/test_label_tables.py::test_all_three_refuse_alike"

ROWS: tuple[Row, ...] = (
    *(Row(f"pictures/{name}", DEEP, as_the_8_bit_original) for name in ("x16.png", "x16.tif", "x32i.tif")),
    Row("pictures/exif6.jpg", TURNED, upright),
    *(Row(f"dicom/{name}", DICOM, radiograph) for name in ("window_empty", "window_zero", "padding")),
    *(Row(f"dicom/{name}", DICOM, no_contrast) for name in ("window_out", "const")),
    Row("questions/opt_prefixed.tsv", LETTERS, imported),
    *(Row(f"questions/{name}.tsv", BAD_ROWS, left_out) for name in ("dup_opts", "no_answer", "no_image")),
    *(Row(f"questions/{name}.json", BAD_ENTRIES, left_out) for name in ("om_missimg", "om_notin")),
    Row("questions/b64_nl.tsv", f"{FAULTS}test_base64_may_be_wrapped_into_lines", imported),
    *(Row(f"tables/oh_{name}.csv", ALIKE, table()) for name in ("float", "yes", "unc")),
    *(
        Row(f"tables/{name}.csv", ALIKE, table())
        for name in ("nan_labels", "comma_labels", "semicolon", "tab")
    ),
    Row("tables/old.xls", OLD, told("old.xls")),
    Row("tables/second_sheet.xlsx", SHEETS, sheets),
    Row("tables/dup_header.csv", TWICE, told("has two columns 'labels'")),
    *(
        Row(f"conversations/{name}.json", SAME, rows(1))
        for name in ("messages", "images_key", "qwen_vl", "conversatons")
    ),
    Row("conversations/system.json", SYSTEM, rows(1)),
    Row("conversations/image_empty_string.json", BLANK, rows(1, 0)),
    Row("conversations/nan.json", BLANK, rows(0)),
    Row("weights/zero_pp_rank_0_mp_rank_00_model_states.pt", ZERO, named("ZeRO-3", "zero_to_fp32.py")),
    Row("weights/lfs.pt", POINTER, named("git lfs pull")),
    Row("weights/np_scalar.pt", BESIDE, inspected),
    Row("weights/jit.pt", ARCHIVE, named("no supported vision tower among")),
    Row("weights/two sets in one file", SETS, two_sets),
)


UNLISTED = {
    "weights/two sets in one file": (
        "silent: the raw ones are taken",
        "said by inspect and swap, `--weights ema|raw`",
    ),
}
"""What the README asks for outside of its tables: path of a case -> what it did, and what it must do."""


def everything(cases: Path) -> Iterator[Row]:
    """All rows, with those of the folders that fuzzing found."""
    yield from ROWS
    for folder in sorted((cases / "fuzz").iterdir()):
        yield Row(f"fuzz/{folder.name}", CORPUS, fuzzed)


def asked(cases: Path) -> dict[str, tuple[str, str]]:
    """What the README says: path of a case -> what it did, and what it must do."""
    found = dict(UNLISTED)
    folder = ""
    for line in (cases / README).read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## (\w+)/", line):
            folder = heading[1]
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("| ") and folder and len(cells) == 3 and cells[0] not in ("file", "folder"):
            for name in cells[0].split(", "):
                found[f"{folder}/{name.split(' ')[0]}"] = (cells[1], cells[2])
    return found


def run(cases: Path, row: Row) -> str:
    """What a case does now."""
    with tempfile.TemporaryDirectory(prefix="case-") as scratch:
        found = row.outcome(cases / row.case, Path(scratch))
        return found.replace(f"{cases}/", "").replace(scratch, "TMP")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.case)
def test_a_case_is_what_it_must_be(row: Row, cases: Path) -> None:
    print(f"\n{row.case} | {run(cases, row)} | {row.test}")  # noqa: T201 (for -s)


@pytest.mark.slow  # a process for each reader; the fuzzer's own corpus is tried by default
def test_what_fuzzing_found_is_read_or_refused(cases: Path) -> None:
    for row in everything(cases):
        if row.outcome is fuzzed:
            print(f"\n{row.case} | {run(cases, row)} | {row.test}")  # noqa: T201


def test_every_row_of_the_readme_is_here(cases: Path) -> None:
    assert set(asked(cases)) <= {row.case for row in ROWS}


def test_every_row_names_a_test_that_is_there() -> None:
    root = Path(__file__).parents[1]
    for _, test, _ in ROWS:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (root / file).read_text(encoding="utf-8"), test


def main() -> None:
    """Print the table."""
    cases = Path(os.environ.get("MGLL_CASES_DIR", Path(__file__).parents[2] / "shared" / "cases"))
    told_of = asked(cases)
    print("| case | before | must | now | test |\n|---|---|---|---|---|")  # noqa: T201
    for row in everything(cases):
        before, must = told_of.get(row.case, ("exit 1", "exit 2, one line, or success"))
        cells = (row.case, before, must, run(cases, row), row.test)
        print(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |", flush=True)  # noqa: T201


def _line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error: ")), lines[-1]).removeprefix("error: ")


if __name__ == "__main__":
    main()
