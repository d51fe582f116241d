"""Memory of a long run: resident memory over many synthetic questions with a tiny model."""

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer

from mgll_encoder.common import cli

app = cli.new_app("Measure memory along many questions.")


@app.command()
def bench(
    model: Annotated[
        Path, typer.Option(help="LLaVA folder in the transformers layout; its processor is used.")
    ],
    questions: Annotated[int, typer.Option(help="Number of questions.", min=10)] = 100_000,
    images: Annotated[int, typer.Option(help="Number of distinct images.", min=1)] = 1000,
    out: Annotated[
        Path | None,
        typer.Option(help="Output folder to keep, so that re-running the command continues a killed run."),
    ] = None,
) -> None:
    """Run the questions and print the resident memory after each tenth of them.

    Example: python scripts/bench/mcq_memory.py --model smol-llava --questions 100000
    """
    import psutil
    import torch
    from rich.console import Console

    from eval_mcq.backends.local import LocalModel
    from eval_mcq.items.schema import load_bench
    from eval_mcq.records.answers_file import append_answers
    from eval_mcq.runs import run as running
    from eval_mcq.scoring.score import Scorer
    from mllm_adapters import load_mllm

    console, process = Console(), psutil.Process()
    with tempfile.TemporaryDirectory() if out is None else nullcontext(out) as work:
        folder, bench_file = Path(work) / "model", Path(work) / "bench.jsonl"
        if not folder.is_dir():
            _tiny(model, folder)
        if not bench_file.is_file():
            _synthetic(bench_file, questions, images)
        asked = load_bench(bench_file)
        scorer = Scorer(*load_mllm(folder, dtype=torch.float32))
        record = running.describe_run(LocalModel(folder, dtype="float32").identity, asked)
        done = running.answered(Path(work) / "run")
        rows, start = done, time.perf_counter()
        loaded = process.memory_info().rss
        console.print(f"{questions} questions read, {done} answered, model loaded: {loaded / 2**20:.0f} MiB")

        def watched(path: Path, answers: Any) -> None:
            nonlocal rows
            new = list(answers)
            append_answers(path, new)
            before, rows = rows, rows + len(new)
            if before * 10 // questions != rows * 10 // questions:
                now = process.memory_info().rss
                speed = (rows - done) / (time.perf_counter() - start)
                console.print(
                    f"{rows} answered: {now / 2**20:.0f} MiB ({(now - loaded) / 2**20:+.0f}), {speed:.0f}/s"
                )

        with patch.object(running, "append_answers", watched):
            running.run_bench(asked, lambda: scorer, record, Path(work) / "run")
        console.print(f"with table and intervals: {process.memory_info().rss / 2**20:.0f} MiB")


def _synthetic(file: Path, questions: int, images: int) -> None:
    """Write a benchmark about uniform pictures, with four options per question."""
    from PIL import Image

    from eval_mcq.items.schema import BenchHeader, MCQItem, write_bench

    file.parent.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        Image.new("RGB", (32, 32), (i % 256, i // 256 % 256, 90)).save(file.with_name(f"{i}.png"))
    options = ["cataract", "glaucoma", "drusen", "normal fundus"]
    items = [
        MCQItem(id=f"q{i}", images=[f"{i % images}.png"], question=f"What is seen ({i // images})?", options=options,
                answer=i % 4, category=options[i % 4])
        for i in range(questions)
    ]  # fmt: skip
    write_bench(file, BenchHeader(name="synthetic"), items)


def _tiny(model: Path, folder: Path) -> None:
    """Write a model with one layer of width 32 and four visual tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config, processor = (
        AutoConfig.from_pretrained(model, trust_remote_code=False),
        AutoProcessor.from_pretrained(model, trust_remote_code=False),
    )
    config.text_config.update(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 16}
    )  # fmt: skip
    config.vision_config.update({"image_size": 28, "patch_size": 14, "num_hidden_layers": 2})
    config.image_seq_length = 4
    processor.image_processor.size = processor.image_processor.crop_size = {"height": 28, "width": 28}
    processor.patch_size = 14
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, trust_remote_code=False).float().save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    cli.run(app)
