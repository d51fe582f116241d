"""One vocabulary over all commands: a word has one meaning, a meaning one word, and the page of options is current."""

from collections import defaultdict
from collections.abc import Callable, Mapping

from mgll_encoder.common.old_options import OLD_OPTIONS
from mgll_encoder.common.option_table import OptionRow, option_rows
from scripts.options import PAGE, all_rows, page

ROWS = [row for row in all_rows() if row.name.startswith("--")]

OTHER_ARGUMENT = {
    "--json": "as_json", "--all": "every", "--list": "", "--table": "table_file", "--weights": "init_weights",
    "--align": "images", "--align-samples": "samples", "--alpha": "alphas", "--text": "texts", "--target": "targets",
    "--part": "parts", "--map": "maps", "--gguf": "out", "--vllm-option": "vllm_options",
}  # fmt: skip
"""Options whose argument in Python has another name: repeatable ones in the plural, and words that Python has taken."""

TWO_FORMATS = {"--format", "--split"}
"""What is chosen from differs: formats of tables and of other tools' files; splits of patients and of foreign data."""

PRECISIONS = ("auto", "float32", "bfloat16", "float16")

NAME_OR_FOLDER = {"--model"}
"""A folder where a model is trained; where it is asked, also a hub id or the name that a server knows."""

STILL = {
    "--data": "rows to train on", "--preset": "set of diseases", "--mode": "scoring mode", "--seed": "draws",
    "--layout": "layout of a checkpoint", "--images": "folder", "--control": "checkpoint", "--delta": "folder",
    "--label": "", "--size": "",
}  # fmt: skip
"""Words that are old names in one command and options in others, with their only meaning."""

COMPUTE = {
    "mgll-encoder pretrain", "mgll-encoder probe", "mgll-encoder zero-shot", "mgll-encoder retrieval",
    "mgll-encoder explain", "swap-encoder", "swap-encoder verify", "retrain-projector", "finetune-lora",
    "eval-mcq run", "eval-mcq check",
}  # fmt: skip


def by_word(of: Callable[[OptionRow], object]) -> Mapping[str, set[object]]:
    found: dict[str, set[object]] = defaultdict(set)
    for row in ROWS:
        found[row.name].add(of(row))
    return found


def several(found: Mapping[str, set[object]]) -> dict[str, set[object]]:
    return {word: values for word, values in found.items() if len(values) > 1}


def test_the_page_is_current() -> None:
    written = page()
    assert PAGE.read_text("utf-8") == written, "run python scripts/options.py"
    assert [row.name for row in ROWS if f"`{row.name}" not in written] == []


def test_a_word_takes_one_kind_of_value() -> None:
    assert several(by_word(lambda row: row.kind)).keys() <= NAME_OR_FOLDER


def test_a_word_is_chosen_from_one_list() -> None:
    assert several(by_word(lambda row: row.choices)).keys() <= {*TWO_FORMATS, "--precision"}
    assert {PRECISIONS} < by_word(lambda row: row.choices)["--precision"]
    assert all(set(row.choices) <= set(PRECISIONS) for row in ROWS if row.name == "--precision")


def test_a_word_is_one_argument_and_an_argument_one_word() -> None:
    other = {
        row.name: row.argument
        for row in ROWS
        if row.argument != row.name.removeprefix("--").replace("-", "_")
    }
    assert other == OTHER_ARGUMENT
    words: dict[str, set[str]] = defaultdict(set)
    for row in ROWS:
        words[row.argument].add(row.name)
    assert {argument: found for argument, found in words.items() if len(found) > 1} == {
        "images": {"--images", "--align"},
        "out": {"--out", "--gguf"},
    }


def test_no_two_words_are_explained_alike() -> None:
    words: dict[str, set[str]] = defaultdict(set)
    for row in ROWS:
        words[row.about].add(row.name)
    assert {about: found for about, found in words.items() if len(found) > 1} == {}


def test_an_old_name_is_no_option_of_another_command() -> None:
    old = {name for renamed in OLD_OPTIONS.values() for name in renamed}
    assert {row.name for row in ROWS} & old <= STILL.keys()


def test_what_computes_takes_a_device() -> None:
    assert {row.command for row in ROWS if row.name == "--device"} == COMPUTE


def test_every_option_is_explained() -> None:
    assert [f"{row.command} {row.name}" for row in ROWS if not row.about.strip().endswith((".", ")"))] == []


def test_the_check_sees_a_word_with_two_meanings() -> None:
    import typer

    app = typer.Typer()

    @app.command()
    def one(labels: str = typer.Option("", help="A.")) -> None: ...

    @app.command()
    def two(labels: int = typer.Option(0, help="B.")) -> None: ...

    rows = list(option_rows(typer.main.get_command(app), "x"))
    assert [(row.command, row.name, row.kind) for row in rows] == [
        ("x one", "--labels", "text"), ("x two", "--labels", "number"),
    ]  # fmt: skip
