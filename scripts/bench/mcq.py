"""Questions per second of eval-mcq, compared with single `generate` calls, lmms-eval's adapter, and bare matmuls.

All contenders run in turns in one run, on the same model, pictures and prompts. The limit is the measured time of the
model's linear layers alone, on the minimum number of tokens (each prefix once).
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from timing import Seconds, Spread, Stopwatch, interleaved

from mgll_encoder.common import cli
from mgll_encoder.common.terminal_table import TerminalTable

if TYPE_CHECKING:
    from eval_mcq.items.schema import Bench
    from eval_mcq.records.batching import Group

app = cli.new_app("Measure eval-mcq side by side with generate and lmms-eval.")

SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
         "num_key_value_heads": 4, "head_dim": 64}  # fmt: skip
"""Language model of the small size."""


@dataclass
class Case:
    """A number of images, questions per image, and rotations."""

    images: int
    per_image: int
    rotations: int

    @property
    def rows(self) -> int:
        """Questions times rotations."""
        return self.images * self.per_image * self.rotations


@app.command()
def bench(
    model: Annotated[Path, typer.Option(help="LLaVA folder in the transformers layout.")],
    questions: Annotated[
        Path, typer.Option("--bench", help="Benchmark file; its pictures and options are used.")
    ],
    size: Annotated[
        str, typer.Option(help="whole: the given model; small: 6 layers of width 256.")
    ] = "whole",
    image_size: Annotated[
        int | None,
        typer.Option(help="Use a new, untrained tower of this image size, patch 14 (336: 576 tokens)."),
    ] = None,
    cases: Annotated[
        str, typer.Option(help="images x questions per image, separated by commas.")
    ] = "8x1,3x4,2x10",
    rotations: Annotated[str, typer.Option(help="Numbers of rotations, separated by commas.")] = "1,4",
    repeats: Annotated[int, typer.Option(help="Number of repeats.", min=1)] = 3,
    new_tokens: Annotated[int, typer.Option(help="Maximum tokens written by generate.", min=1)] = 8,
    lmms_python: Annotated[
        Path | None,
        typer.Option(
            help="Python of an environment with lmms-eval and decord; without it, this row is omitted."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Measure questions per second.

    Example: python scripts/bench/mcq.py --model smol-llava --bench test.jsonl --lmms-python lmms/bin/python
    """
    from rich.console import Console

    from eval_mcq.items.schema import load_bench

    console = Console()
    with tempfile.TemporaryDirectory() as work:
        folder = variant(model, size, image_size, Path(work) / "model")
        contenders = _Contenders(folder, load_bench(questions), new_tokens, lmms_python)
        table = (
            TerminalTable(fixed=3)
            .add_words("images x questions", "rotations", "contender")
            .add_figures("rows/s", "min-max", "time / ours", "cpu time / ours", "same letters")
        )
        figures = []
        for shape in cases.split(","):
            images, per_image = map(int, shape.split("x"))
            for count in map(int, rotations.split(",")):
                case = Case(images, per_image, count)
                for row in contenders.measure(case, repeats):
                    cli.say(f"{shape}, {count} rotations: {row['name']} {row['wall']:.2f} s")
                    figures.append({"images": images, "per_image": per_image, "rotations": count, **row})
                    table.add_row(
                        f"{images} x {per_image}", str(count), row["name"], f"{row['speed']:.2f}",
                        f"{row['slowest']:.2f}-{row['fastest']:.2f}", f"{row['wall_ratio']:.2f}x",
                        f"{row['cpu_ratio']:.2f}x", row["same"],
                    )  # fmt: skip
                table.add_section()
        contenders.close()
    console.print(table)
    for shape in cases.split(","):
        images, per_image = map(int, shape.split("x"))
        ours = [
            f
            for f in figures
            if f["name"] == "eval-mcq" and (f["images"], f["per_image"]) == (images, per_image)
        ]
        if len(ours) > 1:
            wall, cpu = (ours[-1][clock] / ours[0][clock] for clock in ("wall", "cpu"))
            many, few = ours[-1]["rotations"], ours[0]["rotations"]
            console.print(f"{shape}: {many} rotations cost {wall:.2f}x of {few} (cpu time {cpu:.2f}x)")
    if lmms_python is None:
        console.print("lmms-eval: skipped (no --lmms-python)")
    if out:
        out.write_text(
            json.dumps({"model": str(model), "size": size, "image_size": image_size, "cases": figures})
        )


class _Contenders:
    """All contenders, on the same questions."""

    def __init__(self, folder: Path, bench: "Bench", new_tokens: int, lmms_python: Path | None) -> None:
        import torch

        from eval_mcq.scoring.score import Scorer
        from mllm_adapters import load_mllm

        self.bench, self.new_tokens = bench, new_tokens
        self.model: Any
        self.processor: Any
        self.model, self.processor = load_mllm(folder, dtype=torch.float32)
        self.scorer = Scorer(self.model, self.processor)
        self.worker = (
            _worker(lmms_python, folder, self.processor.chat_template, new_tokens) if lmms_python else None
        )

    def measure(self, case: Case, repeats: int) -> Iterator[dict[str, Any]]:
        """Time all contenders, in turns."""
        bench = asked(self.bench, case)
        runs: dict[str, Callable[[], tuple[Seconds, list[int | None]]]] = {
            "eval-mcq": lambda: self._ours(bench, case),
            "generate, one by one": lambda: self._generate(bench, case),
            "limit (linear layers alone)": lambda: self._limit(bench, case),
        }
        if self.worker:
            runs["lmms-eval llava_hf"] = lambda: self._lmms(bench, case)
        self._ours(bench, case)  # the first run tries the strategies
        rounds = interleaved(runs, repeats)
        times = {name: [spent for spent, _ in of] for name, of in rounds.items()}
        letters = {name: of[-1][1] for name, of in rounds.items()}
        ours = times["eval-mcq"]
        for name, turns in times.items():
            pairs = [(a, b) for a, b in zip(letters["eval-mcq"], letters[name], strict=True) if b is not None]
            walls = [one.wall for one in turns]
            yield {
                "name": name, "wall": _middle(turns, "wall"), "cpu": _middle(turns, "cpu"),
                "speed": case.rows / _middle(turns, "wall"),
                "slowest": case.rows / max(walls), "fastest": case.rows / min(walls),
                "wall_ratio": _middle(turns, "wall") / _middle(ours, "wall"),
                "cpu_ratio": _middle(turns, "cpu") / _middle(ours, "cpu"),
                "same": f"{sum(a == b for a, b in pairs)}/{len(pairs)}" if pairs else "",
            }  # fmt: skip

    def close(self) -> None:
        """Stop the other process."""
        if self.worker:
            assert self.worker.stdin is not None
            self.worker.stdin.close()
            self.worker.wait()

    def _ours(self, bench: "Bench", case: Case) -> tuple[Seconds, list[int | None]]:
        from eval_mcq.runs.run import ROWS, scored

        watch = Stopwatch()
        found = [
            score.choice
            for _, scores in scored(bench, self.scorer, batches_of(bench, case, ROWS))
            for of_group in scores
            for score in of_group
        ]
        return watch.seconds(), found

    def _generate(self, bench: "Bench", case: Case) -> tuple[Seconds, list[int | None]]:
        import torch

        from eval_mcq.records.batching import asks_of
        from mgll_encoder.common.images import open_image

        watch, found = Stopwatch(), []
        for group in _groups(bench, case):
            for ask in asks_of(group, bench.items):
                images = [open_image(path) for path in bench.image_paths(ask.item)]
                batch = self.processor(
                    text=self.scorer.prompt(ask.item, ask.rotation), images=images, return_tensors="pt",
                    add_special_tokens=False,
                )  # fmt: skip
                with torch.inference_mode():
                    written = self.model.generate(**batch, max_new_tokens=self.new_tokens, do_sample=False)
                reply = self.processor.tokenizer.decode(
                    written[0, batch["input_ids"].shape[1] :], skip_special_tokens=True
                )
                found.append(_read(reply, ask))
        return watch.seconds(), found

    def _lmms(self, bench: "Bench", case: Case) -> tuple[Seconds, list[int | None]]:
        from eval_mcq.records.batching import asks_of
        from eval_mcq.scoring.prompt import render

        assert self.worker is not None
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        asks = [ask for group in _groups(bench, case) for ask in asks_of(group, bench.items)]
        lines = [(str(bench.image_paths(ask.item)[0]), render(ask.item, ask.rotation)) for ask in asks]
        self.worker.stdin.write(json.dumps(lines) + "\n")
        self.worker.stdin.flush()
        made = json.loads(self.worker.stdout.readline())
        return Seconds(made["wall"], made["cpu"]), [
            _read(reply, ask) for reply, ask in zip(made["replies"], asks, strict=True)
        ]

    def _limit(self, bench: "Bench", case: Case) -> tuple[Seconds, list[int | None]]:
        """Run the linear layers on the minimum number of tokens: the tower once per image, each text prefix once."""
        import torch
        from torch import nn
        from torch.nn.functional import linear

        from eval_mcq.records.batching import asks_of
        from eval_mcq.scoring.packing import token_tree
        from mgll_encoder.common.images import open_image

        config, head = self.model.config.vision_config, self.model.get_output_embeddings()
        patches = (config.image_size // config.patch_size) ** 2
        spent = Seconds(0.0, 0.0)
        for batch in batches_of(bench, case, 32):
            tokens, rows = 0, 0
            for group in batch:
                images = [open_image(path) for path in bench.image_paths(bench.items[group.first])]
                tokens += len(token_tree(self.scorer.prepare(asks_of(group, bench.items), images)))
                rows += len(group.asks)
            for name, layer in self.model.named_modules():
                if isinstance(layer, nn.Linear):
                    image_part = "vision_tower" in name or "projector" in name
                    count = rows if layer is head else patches * len(batch) if image_part else tokens
                    given = torch.randn(count, layer.in_features)
                    with torch.inference_mode():
                        watch = Stopwatch()
                        linear(given, layer.weight)
                        spent += watch.seconds()
        return spent, [None] * case.rows


def _middle(spent: list[Seconds], clock: str) -> float:
    return Spread.of(getattr(one, clock) for one in spent).median


def asked(bench: "Bench", case: Case, first: int = 0) -> "Bench":
    """Build questions about some pictures, from the first given one: the picture's own, then those of others."""
    import dataclasses

    pictures = list({tuple(item.images): item for item in reversed(bench.items)}.values())[::-1]
    pictures = pictures[first : first + case.images]
    items = []
    for number, picture in enumerate(pictures):
        for k in range(case.per_image):
            other = bench.items[(number + 37 * k) % len(bench.items)]
            asked = picture if k == 0 else other
            place = {"id": f"{number}-{k}", "images": picture.images}
            items.append(asked.model_copy(update=place))
    return dataclasses.replace(bench, items=items)


def _groups(bench: "Bench", case: Case) -> "list[Group]":
    from eval_mcq.records.batching import groups

    return groups(bench.items, case.rotations)


def batches_of(bench: "Bench", case: Case, rows: int) -> "list[list[Group]]":
    """Return the batches of a run."""
    from eval_mcq.records.batching import batches

    return batches(_groups(bench, case), rows)


def _read(reply: str, ask: Any) -> int | None:
    from eval_mcq.scoring.answer_parser import parse_reply
    from eval_mcq.scoring.prompt import order

    places = order(len(ask.item.options), ask.rotation)
    place = parse_reply(reply, [ask.item.options[option] for option in places])
    return None if place is None else places[place]


def variant(model: Path, size: str, image_size: int | None, folder: Path) -> Path:
    """Return the model, or a variant with another language model or tower; weights do not affect the time."""
    if size == "whole" and image_size is None:
        return model
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    if size == "small":
        config.text_config.update(SMALL)
    if image_size:
        config.vision_config.update({"image_size": image_size, "patch_size": 14})
        config.image_seq_length = (image_size // 14) ** 2
        side = {"height": image_size, "width": image_size}
        processor.image_processor.size = processor.image_processor.crop_size = side
        processor.patch_size = 14
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, trust_remote_code=False).float().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _worker(python: Path, model: Path, template: str, new_tokens: int) -> "subprocess.Popen[str]":
    script = Path(__file__).with_name("lmms_eval_worker.py")
    arguments = [str(python), str(script), str(model), template, str(new_tokens)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    worker = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        raise typer.BadParameter(f"{python} could not load lmms-eval's adapter (see above)")
    return worker


if __name__ == "__main__":
    cli.run(app)
