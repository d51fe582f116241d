"""Benefit of alignment: a plain swap against the same swap aligned, and the retraining steps needed to catch up.

Results already in the ``--out`` file are not measured again, so an interrupted run can be continued.

python scripts/bench/align.py --mllm models/base --encoder towers/mgll --align images/ \
    --data test.json --train train.json --images images/ --steps 300
"""

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgll_encoder.common import cli
from mgll_encoder.common.files import write_text
from mgll_encoder.common.terminal_table import TerminalTable

if TYPE_CHECKING:
    from mllm_adapters.alignment.align import Alignment
    from mllm_adapters.core.contract import Family, Plan
    from mllm_adapters.training.prepare import Job

    Maker = Callable[[], tuple[Path, Alignment | None]]

LETTERS = "ABCD"

KEPT = "swapped, connector kept"

app = cli.new_app("Measure alignment in closed form.")


@app.command()
def bench(
    mllm: Annotated[Path, typer.Option(help="Model before the swap.")],
    encoder: Annotated[Path, typer.Option(help="New tower.")],
    align: Annotated[Path, typer.Option(help="Images to align on: a folder, or a manifest.")],
    data: Annotated[
        Path, typer.Option(help="Test conversations with letters as answers (`eval-mcq export`).")
    ],
    train: Annotated[Path, typer.Option(help="Training conversations.")],
    images: Annotated[Path, typer.Option(help="Image folder of both.")],
    samples: Annotated[
        list[int] | None, typer.Option(help="Maximum number of images to align on; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Maximum steps of retraining; 0 for none.")] = 300,
    every: Annotated[int, typer.Option(min=1, help="Steps between two measurements.")] = 10,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the retraining.")] = 1e-3,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of retraining runs, each with a different seed.")
    ] = 1,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of test questions.")] = 300,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Measure with bfloat16 matmuls: twice as fast on a CPU.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure letter accuracy and answer loss of the base, the swap and the aligned swap, before any training.

    Example: python scripts/bench/align.py --mllm base --encoder mgll --align images --data test.json --train train.json
    --images images
    """
    from mllm_adapters.training.prepare import prepare_training
    from mllm_adapters.training.recipe import Recipe

    results: dict[str, Any] = json.loads(out.read_text()) if out and out.is_file() else {}

    def keep() -> None:
        if out:
            write_text(out, json.dumps(results, indent=1) + "\n", force=True)

    with tempfile.TemporaryDirectory() as scratch:

        def made(arm: str, **how: Any) -> "Maker":
            return lambda: swapped(mllm, encoder, Path(scratch) / arm.replace(" ", "-"), **how)

        arms: dict[str, Maker] = {"base": lambda: (mllm, None), KEPT: made(KEPT)}
        arms["swapped, connector re-initialized"] = made("reinitialized", reinitialize=True)
        for number in samples or [500]:
            arms[f"aligned on {number}"] = made(f"aligned on {number}", images=align, samples=number)
        for arm in [name for name in arms if name not in results]:
            folder, alignment = arms[arm]()
            job = prepare_training(folder, data, images, Recipe())
            loss, accuracy = measure(job, limit, bf16=bf16)
            results[arm] = {"loss": loss, "accuracy": accuracy, "chance": chance(job, limit)}
            results[arm]["alignment"] = alignment.record() if alignment else {}
            keep()
        _show_arms({name: results[name] for name in arms})
        if steps:
            target = min(r["loss"] for name, r in results.items() if name.startswith("aligned"))
            curves = results.setdefault("retrained", {})
            for seed in range(seeds):
                if str(seed) not in curves:
                    folder, _ = made(f"to retrain {seed}")()
                    recipe = Recipe(max_steps=steps, learning_rate=learning_rate, seed=seed)
                    job = prepare_training(folder, train, images, recipe)
                    test = prepare_training(folder, data, images, Recipe())
                    scores = retrain(job, test, target, every, limit, Path(scratch) / f"retrained-{seed}")
                    curves[str(seed)] = scores
                    keep()
            _show_steps(list(curves.values()), target, steps)


def swapped(
    mllm: Path,
    encoder: Path,
    out: Path,
    *,
    images: Path | None = None,
    samples: int = 0,
    reinitialize: bool = False,
) -> "tuple[Path, Alignment | None]":
    """Swap the tower, and optionally re-initialize the connectors or align them on images."""
    from mgll_encoder import inspect_tower
    from mllm_adapters.alignment.align import align, fitted_plan
    from mllm_adapters.core.registry import open_checkpoint
    from mllm_adapters.swap.apply import apply_plan

    checkpoint, family, _ = open_checkpoint(mllm)
    plan = family.plan(checkpoint, inspect_tower(encoder))
    if images is None:
        return apply_plan(
            _reinitialized(plan, family) if reinitialize else plan, family, checkpoint, out
        ), None
    found = align(plan, family, checkpoint, images, samples=samples)
    fitted = found.apply_to(fitted_plan(plan, family, checkpoint))
    return apply_plan(fitted, family, checkpoint, out, fitted=found.tensors), found


def _reinitialized(plan: "Plan", family: "Family") -> "Plan":
    """Return the plan with re-initialized connectors, as if the width had changed."""
    from mllm_adapters.core.planning import reinitialized

    connectors = {reading.linear for reading in family.connector_layers(plan)}
    steps = [reinitialized(s, s.shape) if s.name.rpartition(".")[0] in connectors else s for s in plan.steps]
    return plan.model_copy(update={"steps": tuple(steps)})


def chance(job: "Job", limit: int) -> float:
    """Return the accuracy of guessing among the options of each question."""
    asked = [example.text for example in job.examples[:limit]]
    return sum(1 / len(re.findall(rf"^[{LETTERS}]\. ", text, re.MULTILINE)) for text in asked) / len(asked)


def measure(job: "Job", limit: int, model: Any | None = None, *, bf16: bool = False) -> tuple[float, float]:
    """Return the mean loss per answer token, and the share of questions whose letter has the largest letter logit."""
    import torch
    from torch.nn.functional import cross_entropy

    from mllm_adapters.data.dataset import IGNORED, AnswerCollator, ConversationDataset

    model = job.model if model is None else model
    tokenizer = job.processor.tokenizer
    letters = torch.tensor([tokenizer.encode(one, add_special_tokens=False)[-1] for one in LETTERS])
    rows = ConversationDataset(job.examples[:limit], job.corpus.folder, job.processor)
    collate = AnswerCollator(tokenizer.pad_token_id or 0)
    loss = tokens = right = 0.0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for start in range(0, len(rows), 16):
            batch = collate([rows[i] for i in range(start, min(start + 16, len(rows)))])
            wanted = batch.pop("shift_labels")
            batch.pop("labels")
            logits = model(**batch).logits.float()
            counted = wanted != IGNORED
            loss += float(cross_entropy(logits[counted], wanted[counted], reduction="sum"))
            tokens += int(counted.sum())
            first = torch.arange(len(wanted)), counted.float().argmax(1)
            right += int((letters[logits[first][:, letters].argmax(1)] == wanted[first]).sum())
    return loss / tokens, right / len(rows)


def retrain(
    job: "Job", test: "Job", target: float, every: int, limit: int, out: Path
) -> list[tuple[int, float]]:
    """Retrain until the test loss reaches that of the aligned swap; return (step, test loss) pairs."""
    from transformers import TrainerCallback

    from mllm_adapters.training.engine import train
    from mllm_adapters.training.recipe import RunOptions

    curve: list[tuple[int, float]] = []

    class Measuring(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ARG002
            if state.global_step % every == 0:
                curve.append((state.global_step, measure(test, limit, rest["model"])[0]))
                rest["model"].train()
                control.should_training_stop = curve[-1][1] <= target

    # No feature cache: the test images must go through the tower.
    train(job, out, RunOptions(report_to=(), feature_cache=False), callbacks=[Measuring()])
    return curve


def _show_arms(results: dict[str, dict[str, Any]]) -> None:
    table = (
        TerminalTable()
        .add_words("")
        .add_figures(
            "answer loss", "accuracy", "of the base's above chance", "R² held out", "seconds to align"
        )
    )
    base = results["base"]
    own = base["accuracy"] - base["chance"]
    for arm, found in results.items():
        fits = [fit["r2"] for fit in found["alignment"].get("connectors", [])]
        above = f"{(found['accuracy'] - found['chance']) / own:.0%}" if own > 0 else "base guesses"
        table.add_row(
            arm,
            f"{found['loss']:.4f}",
            f"{found['accuracy']:.1%}",
            above,
            f"{min(fits):.3f} to {max(fits):.3f}" if fits else "",
            str(found["alignment"].get("seconds", "")),
        )
    cli.stdout.print(table)
    cli.stdout.print(f"Chance: {base['chance']:.1%}")


def _show_steps(curves: Sequence[list[tuple[int, float]]], target: float, steps: int) -> None:
    reached = [next((step for step, loss in curve if loss <= target), None) for curve in curves]
    done = [step for step in reached if step is not None]
    best = min(loss for curve in curves for _, loss in curve)
    cli.stdout.print(
        f"Steps of retraining until the swap reaches the initial loss of the aligned one ({target:.4f}): "
        + (f"median {median(done)}, {min(done)} to {max(done)}; " if done else "")
        + f"{len(curves) - len(done)} of {len(curves)} runs did not reach it in {steps} (best loss {best:.4f})"
    )


if __name__ == "__main__":
    cli.run(app)
