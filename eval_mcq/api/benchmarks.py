"""Make, read, import and export benchmarks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from eval_mcq.api.results import as_run
from mgll_encoder.common.errors import InvalidArgumentError, unknown_name
from mgll_encoder.common.files import check_free, optional_path
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.tables import TableOptions, listed

if TYPE_CHECKING:
    from eval_mcq.formats.importing import ImportReport, OptionLetters
    from eval_mcq.items.build import BuildReport
    from eval_mcq.items.preset import Preset
    from eval_mcq.items.schema import Bench
    from eval_mcq.records.run_record import Run


def list_presets() -> list["Preset"]:
    """Return the packaged presets: diseases, question, number of options, and what they are for."""
    from eval_mcq.items.preset import load_preset, preset_names

    return [load_preset(name) for name in preset_names()]


def build_benchmark(
    labels: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    preset: str = "fundus10",
    diseases: Sequence[str] | None = None,
    options: int | None = None,
    image_column: str = "file",
    labels_column: str = "labels",
    binary_columns: Sequence[str] = (),
    reading: TableOptions | None = None,
    patient_column: str | None = None,
    source_column: str | None = None,
    split: Literal["train", "test", "all"] = "all",
    test_share: float = 0.3,
    split_seed: int = 0,
    seed: int = 0,
    dataset: str | None = None,
    hard_distractors: bool = False,
    min_negatives: int = 5,
    contact_sheet: str | Path | None = None,
    strict: bool = False,
    force: bool = False,
) -> "BuildReport":
    """Build multiple-choice questions from a table of labels, and write them.

    Args:
        labels: Table (CSV, TSV, Excel, Parquet) with one row per image.
        images: Folder that the image column is relative to.
        out: Benchmark file to write (.jsonl).
        preset: Preset by name, or a .json file of the same form.
        diseases: Use only these diseases of the preset.
        options: Options per question; the preset's if not given.
        image_column: Column with the image path.
        labels_column: Column with a list of labels.
        binary_columns: Columns that each represent one label, instead of ``labels_column``.
        reading: Encoding, sheet, separator and uncertain cells, if the file does not specify them.
        patient_column: Column with the patient; splits are by patient.
        source_column: Column with the name of the data set.
        split: Which patients to use.
        test_share: Share of patients in the test split.
        split_seed: Seed of the split.
        seed: Seed of distractors and positions.
        dataset: Published data set that the label file is of (``rfmid``, ``odir``), which defines its columns, or
            ``generic``; the preset's if not given.
        hard_distractors: Prefer diseases that are easily confused with the true one.
        min_negatives: Refuse a disease if fewer images are without it.
        contact_sheet: Also write a contact sheet (.png) of the images.
        strict: Stop at the first row that would be skipped.
        force: Replace existing outputs.

    Returns:
        Counts of questions, patients and labels, and what was skipped.

    Raises:
        UserError: table, images or preset cannot be read, or an output exists.
    """
    from eval_mcq.items.askable_rows import LabelTable
    from eval_mcq.items.build import Draw, SplitRule, build
    from eval_mcq.items.image_checks import sheet_of
    from eval_mcq.items.preset import load_preset
    from eval_mcq.items.schema import write_bench
    from mgll_encoder.data.contact_sheet import check_sheet

    target, sheet = Path(out), optional_path(contact_sheet)
    check_free(target, force)
    check_sheet(sheet, force)
    chosen = load_preset(preset)
    if diseases is not None:
        chosen = chosen.only(list(diseases))
    if options is not None:
        chosen = chosen.model_copy(update={"options": options})
    reading = reading or TableOptions()
    binary = tuple(binary_columns) or (listed(labels_column) if "," in labels_column else ())
    table = LabelTable(
        Path(labels), image_column, labels_column, patient_column, source_column, dataset or chosen.layout, binary,
        reading,
    )  # fmt: skip
    if table.layout != "generic" and table != LabelTable(Path(labels), layout=table.layout, reading=reading):
        raise InvalidArgumentError(
            f"data set '{table.layout}' defines the columns: leave the --*-column options out"
        )
    header, items, report = build(
        table, Path(images), target, chosen, SplitRule(split, test_share, split_seed),
        Draw(seed, hard_distractors, min_negatives), strict,
    )  # fmt: skip
    write_bench(target, header, items, force)
    report.images = len({image for item in items for image in item.images})
    report.on_sheet = sheet_of(target, items, sheet, force)
    return report


def load_benchmark(path: str | Path) -> "Bench":
    """Read and validate a benchmark file.

    Raises:
        UserError: there is no such file, or a line is not a valid question (named by line, id and field).
    """
    from eval_mcq.items.schema import load_bench

    return load_bench(Path(path))


def import_benchmark(
    source: str | Path,
    out: str | Path,
    format: str,
    *,
    images: str | Path | None = None,
    maps: Sequence[str] = (),
    split: str | None = None,
    name: str = "",
    skip_bad: bool = False,
    option_letters: "OptionLetters" = "auto",
    force: bool = False,
) -> "ImportReport":
    """Import questions from another tool's file and write them as a benchmark.

    Args:
        source: File, folder of .json files, or hub id (``hf``).
        out: Benchmark file to write (.jsonl or .parquet).
        format: ``vlmevalkit``, ``gmai``, ``omnimedvqa``, ``llava``, ``scienceqa``, ``hf`` or ``parquet``.
        images: Folder that image paths are relative to; that of ``source`` if not given.
        maps: ``field=column`` for a column with a different name.
        split: The split (``hf``, ``scienceqa``).
        name: Name of the benchmark in tables; the file's if not given.
        skip_bad: Skip invalid questions instead of stopping; they are counted by reason.
        option_letters: Letters in the options: ``strip`` or ``keep`` them; ``auto`` strips them if all questions have
            them.
        force: Replace existing outputs.

    Raises:
        UserError: the file does not have the format, a question or its image is unusable, or ``out`` exists.
    """
    from eval_mcq.formats.importing import FORMATS, ImportSource, import_questions
    from eval_mcq.items.schema import write_bench

    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    target = Path(out)
    check_free(target, force)
    skipped = Skipped(strict=not skip_bad, unit="questions")
    folder = optional_path(images)
    given = ImportSource(str(source), folder, split, maps, option_letters, skipped)
    header, items, report = import_questions(format, given, target, name, force)
    write_bench(target, header, items, force)
    return report


def export_benchmark(
    bench: str | Path,
    out: str | Path,
    format: str = "llava",
    *,
    images: str | Path | None = None,
    run: "Run | str | Path | None" = None,
    force: bool = False,
) -> int:
    """Write questions, or a run's answers, in another tool's format.

    Args:
        bench: Benchmark file.
        out: File (for ``lmms-eval``: folder) to write.
        format: ``llava``, ``messages``, ``trl``, ``vlmevalkit``, ``lmms-eval``, ``parquet`` or ``jsonl``.
        images: ``llava``, ``messages``, ``trl``: folder to write image paths relative to; that of ``out`` if not given.
        run: ``vlmevalkit``: write the answers of this run instead, to be scored there.
        force: Replace an existing output.

    Returns:
        Number of questions or answers.

    Raises:
        UserError: an argument does not apply to the format, an image cannot be read, or ``out`` exists.
    """
    from eval_mcq.formats.export import BY_PATH, EXPORTERS, write_predictions
    from mgll_encoder.data.manifest import warn_if_test

    if format not in EXPORTERS:
        raise unknown_name("format", format, EXPORTERS)
    target = Path(out)
    check_free(target, force)
    if images is not None and format not in BY_PATH:
        raise InvalidArgumentError(
            f"`images` has no effect on format '{format}': only llava, messages and trl refer to images by path"
        )
    if run is not None and format != "vlmevalkit":
        raise InvalidArgumentError(
            f"`run` has no effect on format '{format}': predictions are written for vlmevalkit"
        )
    questions = load_benchmark(bench)
    if run is not None:
        return write_predictions(questions, as_run(run), target, force)
    if format in BY_PATH:
        warn_if_test(questions.path, questions.header.built)
    EXPORTERS[format](questions, target, Path(images or target.absolute().parent), force)
    return len(questions.items)
