"""Speed of projector retraining, with and without the feature cache, compared with a bare training loop.

python scripts/bench/retrain.py --shape llava-7b --out retrain.json
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from timing import Spread, interleaved, paired_ratios

from mgll_encoder.common import cli
from mgll_encoder.common.errors import unknown_name
from mgll_encoder.common.faults import CACHE
from mgll_encoder.common.files import write_text
from mgll_encoder.common.terminal_table import TerminalTable

app = cli.new_app("Measure samples per second of projector retraining, with and without the feature cache.")

TEXT = "what does this photograph of the retina show and which vessels or lesions can be seen in it"


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA.

    Attributes:
        width: Width of the tower.
        depth: Layers of the tower.
        side: Side of its input in patches of 14 px.
        hidden: Width of the language model.
        layers: Layers of the language model.
        words: Words per answer.
    """

    width: int
    depth: int
    side: int
    hidden: int
    layers: int
    words: int


SHAPES: Mapping[str, Shape] = {
    # ViT-L/14-336 takes 0.38 TFLOP for an image, Vicuna-7B 8.6 for 640 tokens: 4 %. Here 0.08 and 1.7 GFLOP.
    "llava-7b": Shape(width=128, depth=3, side=8, hidden=256, layers=8, words=40),
    # A ViT-L/14-336 before SmolLM2-135M: 0.38 TFLOP and 0.17, so the tower takes twice the language model's forward.
    "smollm2": Shape(width=256, depth=12, side=8, hidden=192, layers=6, words=40),
    "smoke": Shape(width=32, depth=2, side=2, hidden=32, layers=2, words=4),
}

Clock = Callable[[], float]


@app.command()
def bench(
    shape: Annotated[
        str, typer.Option(help="Proportions of tower and language model: llava-7b or smollm2.")
    ] = "llava-7b",
    steps: Annotated[int, typer.Option(min=2, help="Timed steps per repeat.")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Number of interleaved repeats.")] = 5,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: time of this process, for a shared machine.")
    ] = "wall",
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
) -> None:
    """Time four variants of projector retraining, interleaved.

    limit: a bare loop over batches in memory, including features. bare: the same loop over a data loader on the cache.
    cached: the Trainer with our callbacks, as in retrain-projector. uncached: the same without the cache.

    Example: python scripts/bench/retrain.py --shape llava-7b --clock cpu
    """
    clocks: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
    for kind, name, known in (("shape", shape, SHAPES), ("clock", clock, clocks)):
        if name not in known:
            raise unknown_name(f"--{kind}", name, known)
    with tempfile.TemporaryDirectory() as work:
        os.environ[CACHE] = f"{work}/cache"
        arms = _arms(Path(work), SHAPES[shape], batch_size, steps, clocks[clock])
        seconds = interleaved(arms, repeats, rehearsals=1)
    rates = {name: [batch_size * steps / value for value in values] for name, values in seconds.items()}
    _show(rates, shape, clock)
    if out:
        record = {
            "shape": shape,
            "clock": clock,
            "batch_size": batch_size,
            "steps": steps,
            "samples_per_second": rates,
        }
        write_text(out, json.dumps(record, indent=2) + "\n", force)


def _show(rates: Mapping[str, list[float]], shape: str, clock: str) -> None:
    table = TerminalTable(f"Projector retraining, {shape}, samples per second ({clock})").add_words("arm")
    table.add_figures("median", "min", "max", "of the limit", "of the bare loop")
    for name, values in rates.items():
        ratios = [f"{paired_ratios(values, rates[other]).median:.3f}" for other in ("limit", "bare")]
        figures = [f"{value:.2f}" for value in Spread.of(values)]
        table.add_row(name, *figures, *ratios)
    cli.stdout.print(table)


def _arms(
    work: Path, shape: Shape, batch_size: int, steps: int, clock: Clock
) -> dict[str, Callable[[], float]]:
    """Return name -> function that runs the arm once and returns the seconds of all steps but the first."""
    from mllm_adapters.core.stages import apply_stage
    from mllm_adapters.data.corpus import Corpus, read_corpus
    from mllm_adapters.data.dataset import ConversationDataset, prepare_examples
    from mllm_adapters.feature_cache.cache import cache_features
    from mllm_adapters.feature_cache.precompute import ComputeSettings
    from mllm_adapters.loading.load import load_mllm

    data = _data(work, shape, batch_size * (steps + 1))
    folder = _model(work / "model", shape)
    corpus: Corpus = read_corpus(data, work / "images")

    def ready() -> tuple[Any, Any, Any]:
        import torch

        model, processor = load_mllm(folder, dtype=torch.float32)
        apply_stage(model)
        examples, _ = prepare_examples(corpus, processor, 2048, False)
        return model, processor, examples

    uncached, processor, examples = ready()
    model, _, _ = ready()
    device = next(model.parameters()).device
    cached = cache_features(model, examples, corpus, processor, ComputeSettings(device))
    assert cached is not None, "a LLaVA can be cached"
    from mllm_adapters.data.dataset import AnswerCollator

    opened = ConversationDataset(examples, corpus.folder, processor)
    pad = processor.tokenizer.pad_token_id
    in_memory = list(_loader(cached.dataset, cached.collator, batch_size))
    return {
        "limit": lambda: _bare(model, in_memory, clock),
        "bare": lambda: _bare(model, _loader(cached.dataset, cached.collator, batch_size), clock),
        "cached": lambda: _trainer(model, cached.dataset, cached.collator, batch_size, clock, work),
        "uncached": lambda: _trainer(uncached, opened, AnswerCollator(pad), batch_size, clock, work),
    }


def _loader(dataset: Any, collator: Any, batch_size: int) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(dataset, batch_size=batch_size, collate_fn=collator)


def _bare(model: Any, batches: Iterable[Any], clock: Clock) -> float:
    """Run only forward, backward, clipping and optimizer."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, 100)
    began = 0.0
    for number, batch in enumerate(batches):
        if number == 1:
            began = clock()
        # As the Trainer: the loss over all answer tokens of the step.
        count = (batch["labels"] != -100).sum()
        model(**batch, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return clock() - began


def _trainer(model: Any, dataset: Any, collator: Any, batch_size: int, clock: Clock, work: Path) -> float:
    """Run the Trainer as set up by `mllm_adapters.training.engine.train`."""
    from transformers import TrainerCallback, TrainingArguments

    from mllm_adapters.training.callbacks import Watchdog
    from mllm_adapters.training.trainer import FrozenTrainer

    class Timer(TrainerCallback):
        """Records when steps end."""

        ends: list[float] = []  # noqa: RUF012 (of one run)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(clock())

    timer = Timer()
    timer.ends = []
    arguments = TrainingArguments(
        output_dir=str(work / "run"), num_train_epochs=1, per_device_train_batch_size=batch_size,
        learning_rate=1e-5, lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.0, use_cpu=True,
        logging_steps=10, logging_first_step=True, save_strategy="no", report_to="none",
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = FrozenTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[Watchdog(work), timer],
    )
    trainer.train()
    return timer.ends[-1] - timer.ends[0]


def _data(work: Path, shape: Shape, count: int) -> Path:
    """Write noise photographs with a question and an answer each."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    (work / "images").mkdir()
    words = TEXT.split()
    rows = []
    for i in range(count):
        coarse = Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8))
        coarse.resize((512, 512)).save(work / "images" / f"{i}.jpg")
        answer = " ".join(draw.choice(words, shape.words))
        rows.append(
            {
                "image": f"{i}.jpg",
                "conversations": [
                    {"from": "human", "value": f"<image>\n{TEXT}?"},
                    {"from": "gpt", "value": answer},
                ],
            }
        )
    path = work / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def _model(folder: Path, shape: Shape) -> Path:
    """Write a LLaVA of this shape with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mgll_encoder import Tower
    from mgll_encoder.tower.model import build_model
    from mgll_encoder.tower.spec import TowerSpec
    from mllm_adapters.core.processing import llava_processor
    from mllm_adapters.examples.assembly import assemble, tower_contract
    from mllm_adapters.examples.language_models import CHATML, Speech, tiny

    torch.manual_seed(0)
    spoken = tiny([TEXT, "\nuser\n", "\nassistant\n"], TEXT.split(), 0)
    config = LlamaConfig(
        **{
            **spoken.model.config.to_dict(),
            "hidden_size": shape.hidden, "intermediate_size": shape.hidden * 43 // 16, "head_dim": None,
            "num_hidden_layers": shape.layers, "num_attention_heads": 4, "num_key_value_heads": 4,
        }
    )  # fmt: skip
    speech = Speech(LlamaForCausalLM(config), spoken.tokenizer, spoken.image_token_id)
    spec = TowerSpec(
        width=shape.width, depth=shape.depth, heads=4, mlp_width=4 * shape.width, patch_size=14,
        image_size=14 * shape.side, activation="quick_gelu",
    )  # fmt: skip
    model = assemble(Tower.from_model(build_model(spec), spec), speech, 0)
    model.save_pretrained(folder)
    llava_processor(tower_contract(spec), speech.tokenizer, CHATML).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    cli.run(app)
