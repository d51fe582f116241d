"""Run a benchmark on a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from eval_mcq.api.benchmarks import load_benchmark
from eval_mcq.backends.base import EngineName
from eval_mcq.runs.processes import answer
from mgll_encoder.common.devices import Precision
from mgll_encoder.common.errors import InvalidArgumentError

if TYPE_CHECKING:
    from eval_mcq.backends.base import Backend
    from eval_mcq.backends.server import Endpoint
    from eval_mcq.records.batching import Shard
    from eval_mcq.records.run_record import Run
    from eval_mcq.scoring.prompt import Mode


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
