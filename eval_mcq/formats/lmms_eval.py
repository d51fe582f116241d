"""A task folder for lmms-eval: a YAML and a Parquet file, no code.

Source of the format: EvolvingLMMs-Lab/lmms-eval 0.7.3, lmms_eval/api/task.py (a ``doc_to_*`` that names a column
returns that column).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval_mcq.items.image_checks import content_name, with_pictures
from eval_mcq.items.schema import Bench
from eval_mcq.scoring.prompt import render
from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.files import new_folder

DATA = "data"


def task_name(out: Path) -> str:
    """Return the name of the task of a folder in lmms-eval."""
    return re.sub(r"\W+", "_", out.name.lower()).strip("_")


def write_task(bench: Bench, out: Path, force: bool = False) -> None:
    """Write the folder, completely or not at all. The prompts are those of eval-mcq.

    Raises:
        UserError: ``out`` exists, a question has several images, or an image cannot be read.
    """
    import datasets
    import yaml

    several = next((item for item in bench.items if len(item.images) > 1), None)
    if several:
        raise BadDataError(
            f"question '{several.id}' has {len(several.images)} images: a task of lmms-eval without code supports one; "
            "export to vlmevalkit"
        )
    task = task_name(out)
    text = datasets.Value("string")
    features = datasets.Features(
        {
            "id": text, "image": datasets.Image(mode="RGB"), "prompt": text, "target": text, "question": text,
            "options": datasets.List(text), "category": text, "source": text, "patient": text,
        }
    )  # fmt: skip
    settings = {
        "task": task, "dataset_path": str(out.absolute() / DATA), "test_split": "test", "output_type": "generate_until",
        "doc_to_visual": "image", "doc_to_text": "prompt", "doc_to_target": "target",
        "generation_kwargs": {"max_new_tokens": 16, "temperature": 0, "do_sample": False},
        "metric_list": [
            {
                "metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
                "ignore_punctuation": True,
            }
        ],
        "metadata": {"version": 1.0, "bench_sha256": bench.digest},
    }  # fmt: skip
    with new_folder(out, force) as folder:
        (folder / DATA).mkdir()
        _write_data(folder / DATA / "test-00000-of-00001.parquet", bench, features)
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _write_data(path: Path, bench: Bench, features: Any) -> None:
    from datasets.arrow_writer import ParquetWriter

    with ParquetWriter(features=features, path=str(path)) as writer:
        for row in _rows(bench):
            writer.write(features.encode_example(row))
        writer.finalize()


def _rows(bench: Bench) -> Iterator[dict[str, Any]]:
    for item, ((data, suffix),) in with_pictures(bench):
        yield {
            "id": item.id, "image": {"bytes": data, "path": content_name(data, suffix)},
            "prompt": render(item), "target": item.letter,
            "question": item.question, "options": item.options, "category": item.category, "source": item.source,
            "patient": bench.patients[item.id],
        }  # fmt: skip
