"""The public functions. Paths are checked before anything heavy is imported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from eval_mcq.backends.base import EngineName
from eval_mcq.runs.processes import answer
from mgll_encoder.common.devices import Precision
from mgll_encoder.common.errors import InvalidArgumentError, NotFoundError, unknown_name
from mgll_encoder.common.files import check_free
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.tables import TableOptions, listed

if TYPE_CHECKING:
    from eval_mcq.backends.base import Backend
    from eval_mcq.backends.server import Endpoint
    from eval_mcq.formats.importing import ImportReport, OptionLetters
    from eval_mcq.items.build import BuildReport
    from eval_mcq.items.preset import Preset
    from eval_mcq.items.schema import Bench
    from eval_mcq.records.batching import Shard
    from eval_mcq.records.run_record import Run
    from eval_mcq.scoring.prompt import Mode
    from eval_mcq.tables.table_layout import Grid

TableLayout = Literal["diseases", "paper", "long"]


@dataclass(frozen=True)
class ComparisonTable:
    """A table of results that can be rendered.

    Attributes:
        grid: Its cells.
    """

    grid: "Grid"

    def render(self, format_: str) -> str:
        """Render as text: ``markdown``, ``csv``, ``latex`` or ``rich`` (for terminals)."""
        from eval_mcq.tables.render import RENDERERS

        return RENDERERS[format_](self.grid)

    def to_markdown(self) -> str:
        """Render as Markdown."""
        return self.render("markdown")

    def to_csv(self) -> str:
        """Render as CSV."""
        return self.render("csv")

    def to_latex(self) -> str:
        """Render as LaTeX."""
        return self.render("latex")


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
    from eval_mcq.items.build import Draw, LabelTable, SplitRule, build
    from eval_mcq.items.image_checks import check_sheet, sheet_of
    from eval_mcq.items.preset import load_preset
    from eval_mcq.items.schema import write_bench

    target, sheet = Path(out), None if contact_sheet is None else Path(contact_sheet)
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
    folder = None if images is None else Path(images)
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
        return write_predictions(questions, _arms({"": run})[""], target, force)
    EXPORTERS[format](questions, target, Path(images or target.absolute().parent), force)
    return len(questions.items)


def run(
    model: str | Path,
    bench: str | Path,
    out: str | Path | None = None,
    *,
    endpoint: "Endpoint | str | None" = None,
    mode: "Mode | Literal['auto']" = "auto",
    rotations: int = 1,
    shard: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    load_in_4bit: bool = False,
    engine: EngineName = "auto",
    vllm_python: str | Path | None = None,
    vllm_options: Sequence[str] = (),
    allow_leak: bool = False,
    force: bool = False,
) -> "Run | None":
    """Run a benchmark on a model. An interrupted run is continued.

    Args:
        model: Model folder or hub id: of a supported family, or any that transformers loads as image-text-to-text; with
            ``endpoint`` the model's name at the server.
        bench: Benchmark file.
        out: Run folder; ``runs/<model>`` if not given.
        endpoint: An OpenAI-compatible server that answers: its base URL, or an `Endpoint` with further settings. The
            images and questions are sent to it.
        mode: ``letters`` (probability of the option letters), ``options`` or ``options-mean`` (likelihood of the option
            texts) or ``generate`` (a written reply); ``auto`` is ``letters``, or ``generate`` at an endpoint without
            log-probabilities.
        rotations: Number of rotations of the options per question.
        shard: ``i/n``: answer only this part.
        batch_size: Questions times rotations per step.
        limit: Use only this many questions from the beginning.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto`` uses the GPU if there is one.
        precision: ``auto`` is bfloat16 on a GPU and float32 elsewhere.
        load_in_4bit: Load NF4 weights (bitsandbytes).
        engine: What is shared between questions; ``plain`` shares nothing. ``vllm`` has letters scored by vLLM.
        vllm_python: Interpreter of vLLM's environment; the variable ``MGLL_VLLM_PYTHON`` or this one if not given.
        vllm_options: Options of ``vllm.LLM``, each as ``NAME=VALUE``, such as ``tensor_parallel_size=2``.
        allow_leak: Run even if the model was trained on images of the benchmark; the run records how many.
        force: Replace a different run.

    Returns:
        The run; None in all processes of a distributed launch but the first.

    Raises:
        UserError: model or benchmark cannot be read, the model was trained on its images, ``out`` is another run, or
            the endpoint fails or is on another machine without ``allow_upload``.
    """
    from eval_mcq.records.leaks import check_leak
    from eval_mcq.records.model_history import history_of

    folder = Path(out) if out is not None else default_run_folder(model)
    questions, part = load_benchmark(bench), shard_of(shard)
    backend: Backend
    if endpoint is not None:
        here = {
            "device": device, "precision": precision, "load_in_4bit": load_in_4bit, "engine": engine,
            "vllm_python": vllm_python, "vllm_options": vllm_options,
        }  # fmt: skip
        backend = _served(model, endpoint, mode, here)
    elif engine == "vllm":
        letters: Mode = "letters" if mode == "auto" else mode
        backend = _vllm(Path(model), letters, device, precision, load_in_4bit, vllm_python, vllm_options)
    elif vllm_python is not None or vllm_options:
        raise InvalidArgumentError("`vllm_python` and `vllm_options` have no effect without `engine=vllm`")
    else:
        from eval_mcq.backends.choice import backend_here

        backend = backend_here(
            model, mode, device=device, precision=precision, load_in_4bit=load_in_4bit, engine=engine
        )
    identity = backend.identity
    from eval_mcq.runs.run import Settings, check_resumable, describe_run

    leak = check_leak(backend.folder, questions, allow=allow_leak) if backend.folder else None
    history = history_of(backend.folder) if backend.folder else None
    record = describe_run(identity, questions, backend.mode, rotations, part, leak, history)
    check_resumable(folder, record, force)
    settings = Settings(batch_size, limit, force, part)
    return answer(questions, backend.load, record, folder, settings)


def _vllm(
    model: Path, mode: "Mode", device: str, precision: Precision, load_in_4bit: bool, python: str | Path | None,
    options: Sequence[str],
) -> "Backend":  # fmt: skip
    from eval_mcq.backends.vllm_engine import VLLMModel, parse_options, vllm_python

    if device != "auto":
        raise InvalidArgumentError(f"vLLM chooses its device itself: leave `device={device}` out")
    if load_in_4bit:
        raise InvalidArgumentError(
            "`load_in_4bit` is for this project's engine: use `vllm_options=quantization=bitsandbytes`"
        )
    return VLLMModel(model, mode, precision, vllm_python(python), parse_options(options))


def default_run_folder(model: str | Path) -> Path:
    """Return the run folder of a model if none is given."""
    return Path("runs") / Path(model).resolve().name


def _served(
    model: str | Path, endpoint: "Endpoint | str", mode: "Mode | Literal['auto']", here: Mapping[str, object]
) -> "Backend":
    """Return what answers for a model at a server; settings of a model on this machine are refused."""
    from eval_mcq.backends.endpoint import ServedModel
    from eval_mcq.backends.server import Endpoint

    if given := [name for name, value in here.items() if value not in ("auto", False, None, ())]:
        raise InvalidArgumentError(f"`{given[0]}` has no effect with `endpoint`: the server decides")
    server = Endpoint(endpoint) if isinstance(endpoint, str) else endpoint
    return ServedModel(str(model), server, mode)


def shard_of(text: str | None) -> "Shard":
    """Parse ``i/n``; the whole benchmark if not given."""
    from eval_mcq.records.batching import Shard

    return Shard.parse(text) if text else Shard()


def compare(
    runs: "Mapping[str, Run | str | Path] | Mapping[str, Mapping[str, Run | str | Path]]",
    *,
    control_arm: str | None = None,
    table_layout: TableLayout = "paper",
    paper_rounding: bool = False,
    compare: Literal["paper"] | None = None,
) -> ComparisonTable:
    """Compare runs of one benchmark, paired question by question.

    Args:
        runs: Arm -> run or run folder, the first is the base; or model -> such arms. A single run gives its own table.
        control_arm: Arm with the same training and the old tower: gains of the others are against it, its own against
            the first arm. None for the arm called ``control``; without one all gains are against the first arm.
        table_layout: ``paper``: diseases as columns; ``diseases``: as rows, for one model; ``long``: one value per row.
        paper_rounding: Round like the published table: Average of rounded cells, gain of rounded Averages.
        compare: ``paper``: add the published rows of the MGLL paper.

    Raises:
        UserError: a folder is not a run, the runs cannot be compared, no arm has the name of the control, or the layout
            cannot show them.
    """
    models = _models(runs)
    pairs = compare is not None or len(models) > 1
    if pairs and table_layout == "diseases":
        raise InvalidArgumentError(
            "`table_layout=diseases` shows one model and no published rows: use paper or long"
        )
    if compare is not None and table_layout == "long":
        raise InvalidArgumentError(
            "`table_layout=long` has no published rows: leave `compare` out, or use `table_layout=paper`"
        )
    from eval_mcq.tables.multi_model import like_paper_pairs, long_table
    from eval_mcq.tables.published import load_published
    from eval_mcq.tables.summary import compare_models
    from eval_mcq.tables.table_layout import by_disease, like_paper

    comparisons = compare_models(models, control_arm)
    only = next(iter(comparisons.values()))
    if table_layout == "long":
        return ComparisonTable(long_table(comparisons))
    if pairs:
        return ComparisonTable(
            like_paper_pairs(comparisons, paper_rounding, load_published() if compare else None)
        )
    return ComparisonTable((by_disease if table_layout == "diseases" else like_paper)(only, paper_rounding))


def report(
    runs: "Mapping[str, Run | str | Path]",
    out: str | Path,
    *,
    control_arm: str | None = None,
    bench: str | Path | None = None,
    assets: Path | None = None,
    plots: Path | None = None,
    thumbnail_size: int = 256,
    thumbnails: bool = True,
    force: bool = False,
) -> int:
    """Write an HTML report: table, plots, every question with image and answers, and how the models were trained.

    Args:
        runs: Arm -> run or run folder.
        out: Page to write.
        control_arm: As for `compare`.
        bench: Benchmark file, if it was moved.
        assets: Folder for the thumbnails, instead of inside the page.
        plots: Folder for the plots as PNG and SVG files.
        thumbnail_size: Longer side of a thumbnail in pixels.
        thumbnails: Whether to show the images.
        force: Replace existing outputs.

    Returns:
        Number of thumbnails.

    Raises:
        UserError: a run or the benchmark cannot be read, or an output exists.
    """
    named = _arms(runs)
    asked = Path(bench or next(iter(named.values())).record.bench)
    if bench is None and not asked.is_file():
        raise NotFoundError(f"bench {asked} of the runs does not exist: give it with `bench`")
    from eval_mcq.html_report import ReportOptions, write_report

    options = ReportOptions(assets, plots, thumbnail_size, thumbnails, control_arm)
    return write_report(named, load_benchmark(asked), Path(out), options, force=force)


def _models(
    runs: "Mapping[str, Run | str | Path] | Mapping[str, Mapping[str, Run | str | Path]]",
) -> "dict[str, dict[str, Run]]":
    if all(isinstance(arms, Mapping) for arms in runs.values()):
        nested = cast("Mapping[str, Mapping[str, Run | str | Path]]", runs)
        return {model: _arms(arms) for model, arms in nested.items()}
    return {"": _arms(cast("Mapping[str, Run | str | Path]", runs))}


def _arms(arms: "Mapping[str, Run | str | Path]") -> "dict[str, Run]":
    from eval_mcq.records.run_record import load_run

    return {name: load_run(Path(arm)) if isinstance(arm, str | Path) else arm for name, arm in arms.items()}
