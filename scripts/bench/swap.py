"""Measure a swap against load -> replace -> save_pretrained, and against ``cp`` of the bytes that it writes.

Hosts are LLaVA-1.5-7B in the transformers layout with fewer layers: real shapes, random bfloat16. Every repeat runs
each contender once, in a separate process; wall times are of the whole process including imports, and of the work
alone. On a busy machine compare the CPU seconds.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from timing import Spread, paired_ratios

from mgll_encoder.common import cli
from mgll_encoder.common.progress import track
from mgll_encoder.common.terminal_table import TerminalTable

app = cli.new_app("Measure swap-encoder side by side with transformers and with cp.")

GB = 10**9

REPORT = """
import json, sys, time
def report(**phases):
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps({**phases, "peak RSS": int(peak.split()[1]) * 1024 / 1e9}))
"""
"""Prefix of every contender: it reports its own peak memory, because that of a child includes its parent's."""

NO_WORK = ("imports", "of which torch", "cp", "peak RSS")
"""Reported values that are not work time, or are already included in it."""

SWAP = """
began = time.monotonic()
import atexit, gc
from pathlib import Path
from mgll_encoder.common import cli
atexit.register(gc.freeze)  # as `cli.run` does
with cli.importing():
    import torch
    torched = time.monotonic()
    import mllm_adapters.cli.swap, mllm_adapters.families.llava
    from mgll_encoder import inspect_tower
    from mllm_adapters.swap.apply import apply_plan
    from mllm_adapters.loading.load import check_complete
    from mllm_adapters.core.registry import open_checkpoint
host, encoder, out = map(Path, sys.argv[1:])
imported = time.monotonic()
tower = inspect_tower(encoder)
checkpoint, family, _ = open_checkpoint(host)
plan = family.plan(checkpoint, tower)
check_complete(plan)
planned = time.monotonic()
apply_plan(plan, family, checkpoint, out, checked=True)
done = time.monotonic()
report(**{"imports": imported - began, "of which torch": torched - began, "plan": planned - imported,
    "apply": done - planned})
"""

REPLACE = """
began = time.monotonic()
import torch
from transformers import AutoModelForImageTextToText, CLIPVisionModel, LlavaForConditionalGeneration
host, encoder, out, shard = sys.argv[1:]
imported = time.monotonic()
model = AutoModelForImageTextToText.from_pretrained(host, dtype=torch.bfloat16, trust_remote_code=False)
tower = CLIPVisionModel.from_pretrained(encoder, dtype=torch.bfloat16, trust_remote_code=False)
model.model.vision_tower = tower
loaded = time.monotonic()
model.save_pretrained(out, max_shard_size=int(shard))
done = time.monotonic()
report(imports=imported - began, load=loaded - imported, save=done - loaded)
"""

COPY = """
import os, shutil
*files, out = sys.argv[1:]
began = time.monotonic()
os.mkdir(out)
for file in files:
    shutil.copy(file, out)
copied = time.monotonic()
for name in os.listdir(out):
    with open(os.path.join(out, name), "rb") as stream:
        os.fsync(stream.fileno())
report(**{"cp": copied - began, "cp and fsync": time.monotonic() - began})
"""


@app.command()
def bench(
    scratch: Annotated[Path, typer.Option(help="Folder for checkpoints; needs about four times the size.")],
    size: Annotated[float, typer.Option(help="Size of the host in GB, for the comparison.")] = 4.0,
    growth: Annotated[
        str, typer.Option(help="Sizes of hosts in GB, for the scaling; empty for none.")
    ] = "1,2,4,8",
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats.")] = 3,
    shard: Annotated[float, typer.Option(help="Maximum shard size in GB.")] = 1.0,
    shrink: Annotated[int, typer.Option(min=1, help="Divide all widths by this, for a trial run.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Measure wall time, peak memory and bytes written.

    Example: python scripts/bench/swap.py --scratch /scratch/bench --out swap.json
    """
    scratch.mkdir(parents=True, exist_ok=True)
    encoder = write_encoder(scratch / "encoder", shrink)
    runs: dict[str, list[dict[str, float]]] = {}
    try:
        host = write_host(scratch / "host", size, shard, shrink)
        for _ in track(range(repeats), f"comparing at {size:g} GB"):
            swapped = scratch / "swapped"
            _run(runs, "swap", SWAP, host, encoder, swapped)
            touched = [file for file in swapped.glob("*.safetensors") if file.stat().st_nlink == 1]
            _run(runs, "cp of the touched bytes", COPY, *touched, scratch / "copied")
            _run(runs, "load, replace, save", REPLACE, host, encoder, scratch / "saved", int(shard * GB))
            for name in ("swapped", "copied", "saved"):
                shutil.rmtree(scratch / name)
        shutil.rmtree(host)
        _show_ratios(runs)
        for gigabytes in [float(word) for word in growth.split(",") if word]:
            host = write_host(scratch / "host", gigabytes, shard, shrink)
            for _ in track(range(repeats), f"growth: {gigabytes:g} GB"):
                _run(runs, f"swap at {gigabytes:g} GB", SWAP, host, encoder, scratch / "swapped")
                shutil.rmtree(scratch / "swapped")
            shutil.rmtree(host)
    finally:
        for name in ("encoder", "host", "swapped", "copied", "saved"):
            shutil.rmtree(scratch / name, ignore_errors=True)
    if out is not None:
        from mgll_encoder.common.files import write_text

        write_text(out, json.dumps({"size": size, "shard": shard, "runs": runs}, indent=2) + "\n", force=True)
    _show_table(runs)


def write_encoder(folder: Path, shrink: int) -> Path:
    """Write a random CLIP ViT-L/14 at 224 px in bfloat16, as a tower folder."""
    from mgll_encoder import Tower, TowerSpec, build_model, save_tower

    spec = TowerSpec(
        width=1024 // shrink,
        depth=24,
        heads=max(1, 16 // shrink),
        mlp_width=4096 // shrink,
        patch_size=14,
        image_size=224,
        activation="gelu",
    )
    return save_tower(Tower.from_model(build_model(spec).bfloat16(), spec), folder, force=True)


def write_host(folder: Path, gigabytes: float, shard: float, shrink: int) -> Path:
    """Write a LLaVA-1.5-7B of the given size: real shapes, fewer layers; shard by shard, tower first."""
    import torch
    from safetensors.torch import save_file

    tensors, config = _shapes(gigabytes, shrink)
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    shards: list[dict[str, Sequence[int]]] = [{}]
    room = shard * GB
    for name, shape in tensors.items():
        nbytes = 2 * torch.Size(shape).numel()
        if nbytes > room and shards[-1]:
            shards.append({})
            room = shard * GB
        shards[-1][name] = shape
        room -= nbytes
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number, group in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {}
        for name, shape in group.items():
            count = torch.Size(shape).numel()
            values[name] = pool.repeat(-(-count // len(pool)))[:count].reshape(shape).clone()
        save_file(values, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    os.sync()
    return folder


def _shapes(gigabytes: float, shrink: int) -> tuple[dict[str, Sequence[int]], Mapping[str, Any]]:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024 // shrink,
        intermediate_size=4096 // shrink,
        num_hidden_layers=24,
        num_attention_heads=max(1, 16 // shrink),
        image_size=336,
        patch_size=14,
        hidden_act="quick_gelu",
    )

    def built(layers: int) -> tuple[dict[str, Sequence[int]], Mapping[str, Any]]:
        text = LlamaConfig(
            vocab_size=32064,
            hidden_size=4096 // shrink,
            intermediate_size=11008 // shrink,
            num_hidden_layers=layers,
            num_attention_heads=max(1, 32 // shrink),
            tie_word_embeddings=False,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=32000,
            image_seq_length=576,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
            dtype=torch.bfloat16,
            architectures=["LlavaForConditionalGeneration"],
        )
        with torch.device("meta"):
            state = LlavaForConditionalGeneration(config).state_dict()
        names = sorted(state, key=lambda name: ("vision_tower" not in name, "multi_modal" not in name))
        return {name: tuple(state[name].shape) for name in names}, config.to_dict()

    def size(layers: int) -> int:
        return sum(2 * torch.Size(shape).numel() for shape in built(layers)[0].values())

    one, two = size(1), size(2)
    return built(max(1, 1 + round((gigabytes * GB - one) / (two - one))))


def _run(runs: dict[str, list[dict[str, float]]], name: str, script: str, *arguments: object) -> None:
    """Run a contender, and store its report, wall time, peak memory and bytes written."""
    began = time.monotonic()
    command = [sys.executable, "-c", REPORT + script, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    said, complained = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{name} failed: {complained[-2000:]}")
    wall = time.monotonic() - began
    target = next(Path(str(a)) for a in reversed(arguments) if Path(str(a)).is_dir())
    written = sum(f.stat().st_size for f in target.iterdir() if f.is_file() and f.stat().st_nlink == 1)
    found = json.loads(said.splitlines()[-1])
    work = sum(seconds for phase, seconds in found.items() if phase not in NO_WORK)
    cpu = usage.ru_utime + usage.ru_stime
    row = {"wall": wall, "work": work, "cpu": cpu, **found, "written": written / GB}
    runs.setdefault(name, []).append(row)


def _show_table(runs: Mapping[str, list[dict[str, float]]]) -> None:
    table = TerminalTable().add_words("").add_figures("wall s", "without imports s", "CPU s")
    table.add_words("phases s").add_figures("peak RSS GB", "written GB")
    for name, rows in runs.items():
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        phases = [key for key in columns if key not in ("wall", "work", "cpu", "peak RSS", "written")]
        table.add_row(
            name,
            Spread.of(columns["wall"]).text(),
            Spread.of(columns["work"]).text(),
            Spread.of(columns["cpu"]).text(),
            ", ".join(f"{key} {Spread.of(columns[key]).median:.2f}" for key in phases),
            Spread.of(columns["peak RSS"]).text(),
            f"{Spread.of(columns['written']).median:.3f}",
        )
    cli.stdout.print(table)


def _show_ratios(runs: Mapping[str, list[dict[str, float]]]) -> None:
    swap, saved, copied = (runs[name] for name in ("swap", "load, replace, save", "cp of the touched bytes"))
    ratios = {
        "faster than load, replace, save, whole process": (saved, "wall", swap, "wall"),
        "faster than load, replace, save, imports apart": (saved, "work", swap, "work"),
        "apply alone, of cp with fsync": (swap, "apply", copied, "cp and fsync"),
        "apply alone, of cp without": (swap, "apply", copied, "cp"),
    }
    for words, (above, one, below, other) in ratios.items():
        ratio = paired_ratios([row[one] for row in above], [row[other] for row in below])
        cli.stdout.print(f"{words}: {ratio.text()} times")


if __name__ == "__main__":
    cli.run(app)
