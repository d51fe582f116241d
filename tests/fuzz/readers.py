"""Every reader as a row of data: a tiny valid input, which of its files are damaged, what reads them."""

import base64
import contextlib
import csv
import fnmatch
import json
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from tests import builders

GOLDEN = Path(__file__).parents[1] / "golden"

DISEASES = ("AMD", "DR", "glaucoma", "cataract")

DATA = "--data t.json --images images"
"""What the training commands are given."""


@dataclass(frozen=True)
class Reader:
    """A row.

    Attributes:
        name: What ``READERS=`` and the summary call it.
        build: Writes a valid input into an empty folder.
        targets: Patterns of the files that are damaged, relative to that folder.
        commands: Command lines, run in the folder; ``{file}`` is the damaged file, ``{top}`` its first folder.
        stays: Patterns of what a command may leave although it refuses its input.
        valid: Exit codes of the commands on the valid input.
    """

    name: str
    build: Callable[[Path], None]
    targets: tuple[str, ...]
    commands: tuple[str, ...]
    stays: tuple[str, ...] = ()
    valid: tuple[int, ...] = (0,)

    def files(self, folder: Path) -> list[str]:
        """The files of an input that are damaged, in order."""
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        return [name for name in names if any(fnmatch.fnmatch(name, target) for target in self.targets)]

    def may_stay(self, name: str) -> bool:
        """Whether a file may be left where the input was refused."""
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.stays)


def command_for(template: str, file: str) -> str:
    """A command line about a damaged file."""
    return template.replace("{file}", file).replace("{top}", file.split("/")[0])


def _run(command: str, *arguments: object) -> None:
    """Run a command while an input is built."""
    from tests.fuzz.harness import commands

    outcome = builders.invoke(commands()[command], *arguments)
    assert outcome.code == 0, outcome.err


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pictures(folder: Path, n: int = 8) -> None:
    for i in range(n):
        builders.picture(folder / "images", f"p{i:02}.png", (20 * i, 255 - 20 * i, 90))


def _tower(folder: Path) -> None:
    from tests.mllm_adapters.llava_checkpoints import a_tower

    a_tower(folder / "t")


def _llava(folder: Path) -> None:
    builders.tiny_llava(folder / "m")
    _tower(folder)


def _swapped(folder: Path) -> None:
    _llava(folder)
    _run("swap-encoder", "--mllm", folder / "m", "--encoder", folder / "t", "--out", folder / "s")


def _weights(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from tests.mgll_encoder.towers import state_of, vision_model

    state = state_of(vision_model())
    save_file(state, folder / "w.safetensors", metadata={"format": "pt"})
    torch.save({"state_dict": state, "epoch": 3, "lr": 0.1, "args": {"name": "x"}}, folder / "w.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    shutil.copyfile(GOLDEN / "mgll_official" / "checkpoint_best.pth", folder / "official.pth")


def _torchscript(folder: Path) -> None:
    import torch

    module = torch.jit.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3))
    torch.jit.save(module, folder / "jit.pt")


def _tower_folders(folder: Path) -> None:
    from transformers import CLIPImageProcessor

    from tests.mgll_encoder.towers import clip_model, vision_model

    _tower(folder)
    for name, model in (("hf", vision_model()), ("clip", clip_model())):
        model.save_pretrained(folder / name)
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder / name)


def _configs(folder: Path) -> None:
    """A checkpoint of every family that has a golden one, with its parts beside it, and a tower."""
    _llava(folder)
    (folder / "m").rename(folder / "llava-hf")
    for family in (
        "llava", "llava_med", "internvl", "internvl_internlm2", "internvl_qwen2", "janus_pro", "instructblip",
        "qwen_vl", "mini_gemini", "med_flamingo",
    ):  # fmt: skip
        shutil.copytree(GOLDEN / family, folder / family, ignore=shutil.ignore_patterns("expected*"))


def _sharded(folder: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    _llava(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "m")
    (folder / "m" / "model.safetensors").unlink()
    model.save_pretrained(folder / "m", max_shard_size="150KB")
    shutil.copytree(GOLDEN / "llava", folder / "llava", ignore=shutil.ignore_patterns("expected*"))


def _complete(*names: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        from tests.mllm_adapters.complete import BUILDERS

        _tower(folder)
        for name in names:
            BUILDERS[name](folder / name, lambda: GOLDEN)

    return build


def _conversation(i: int, question: str = "What is seen?") -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": f"Finding {i}."}]
    return {"id": f"c{i}", "image": f"p{i:02}.png", "conversations": turns}


def _training_rows(folder: Path) -> None:
    _llava(folder)
    _pictures(folder)
    _json(folder / "t.json", [_conversation(i) for i in range(8)])
    _lines(folder / "t.jsonl", [_conversation(i) for i in range(8)])
    messages = [
        {
            "messages": [
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": f"{i}"},
            ],
            "images": [f"p{i:02}.png"],
        }
        for i in range(8)
    ]
    _json(folder / "messages.json", messages)


def _template(folder: Path) -> None:
    _training_rows(folder)
    shutil.copytree(folder / "m", folder / "old")
    template = (folder / "old" / "chat_template.jinja").read_text()
    (folder / "old" / "chat_template.jinja").unlink()
    _json(folder / "old" / "chat_template.json", {"chat_template": template})


def _bench_rows(n: int = 8) -> list[dict[str, Any]]:
    header = {"schema": "eval-mcq/1", "name": "b", "categories": list(DISEASES), "built": {}}
    return [
        header,
        *(
            {
                "id": f"q{i}", "images": [f"images/p{i:02}.png"], "question": "What is seen?",
                "options": list(DISEASES), "answer": "ABCD"[i % 4], "category": DISEASES[i % 4], "source": "S",
                "patient": f"pt{i // 2}", "tags": ["x"],
            }
            for i in range(n)
        ),
    ]  # fmt: skip


def _bench(folder: Path) -> None:
    _pictures(folder)
    _lines(folder / "b.jsonl", _bench_rows())
    _run("eval-mcq", "export", folder / "b.jsonl", "--format", "parquet", "--out", folder / "b.parquet")


def _runs(folder: Path) -> None:
    from eval_mcq.records.answer import Answer
    from eval_mcq.records.run_record import Run, RunRecord
    from mgll_encoder.common.files import sha256
    from tests.eval_mcq.helpers import save_run

    _pictures(folder)
    _lines(folder / "b.jsonl", _bench_rows())
    digest = sha256(folder / "b.jsonl")
    for name, shift in (("r", 0), ("base", 1)):
        record = RunRecord(
            model=name, model_sha256=name[0] * 64, bench="b.jsonl", bench_name="b", bench_sha256=digest,
            categories=list(DISEASES), questions=8, mode="letters", prompt="letters-1", dtype="float32", rotations=2,
        )  # fmt: skip
        answers = [
            Answer(
                id=f"q{i}", rotation=rotation, category=DISEASES[i % 4], cluster=f"S/pt{i // 2}",
                images_sha256=[sha256(folder / "images" / f"p{i:02}.png")], gold="ABCD"[i % 4],
                chosen="ABCD"[(i + shift * (i % 3)) % 4], letter_mass=0.5, run=record.fingerprint,
                probabilities=[0.4 if j == (i + shift * (i % 3)) % 4 else 0.2 for j in range(4)],
            )
            for i in range(8) for rotation in range(2)
        ]  # fmt: skip
        save_run(Run(folder / name, record, answers), folder / name)


def _labels(folder: Path) -> None:
    import pandas as pd

    _pictures(folder, 20)
    _tower(folder)
    names = ("diabetic retinopathy", "age-related macular degeneration", "glaucoma", "cataract", "normal")
    rows = [["file", "labels", "patient", "keywords"]]
    rows += [[f"p{i:02}.png", names[i % 5], f"pt{i}", f"kw {i}"] for i in range(20)]
    for name, delimiter in (("l.csv", ","), ("l.tsv", "\t")):
        with (folder / name).open("w", newline="") as stream:
            csv.writer(stream, delimiter=delimiter).writerows(rows)
    pd.DataFrame(rows[1:], columns=rows[0]).to_excel(folder / "l.xlsx", index=False)


def _preset(folder: Path) -> None:
    import eval_mcq
    import mgll_encoder.data.fundus

    _labels(folder)
    shutil.copyfile(Path(eval_mcq.__file__).parent / "presets" / "fundus10.json", folder / "p.json")
    shutil.copyfile(mgll_encoder.data.fundus.EXPLANATIONS, folder / "x.json")


def _published(folder: Path) -> None:
    from eval_mcq.tables.published import PAPER

    shutil.copyfile(PAPER, folder / "p.json")


RECIPE = """\
# as a user writes it
learning_rate: 1e-3
num_train_epochs: 2
per_device_train_batch_size: 4
max_length: 512
weight_decay: 0.01
report_to: none
lr_scheduler_type: cosine
adam_betas: [0.9, 0.98]
precision: float32
seed: 3
optim: adamw_torch
"""


def _recipe(folder: Path) -> None:
    _training_rows(folder)
    known = RECIPE.replace("adam_betas: [0.9, 0.98]", "adam_beta2: 0.98")
    (folder / "p.yaml").write_text(known)


def _deepspeed(folder: Path) -> None:
    _training_rows(folder)
    shutil.copyfile(Path(__file__).parents[2] / "scripts" / "deepspeed" / "zero2.json", folder / "ds.json")


def _dicom(folder: Path) -> None:
    from tests.mgll_encoder.test_xray import radiograph, ramp

    radiograph(
        folder / "d" / "a.dcm",
        ramp(),
        WindowCenter="2000",
        WindowWidth="3000",
        RescaleSlope="1",
        RescaleIntercept="0",
    )
    radiograph(folder / "d" / "b.dcm", ramp()[::-1].copy())


def _all_kinds_of_pictures(folder: Path) -> None:
    _training_rows(folder)
    _lines(folder / "b.jsonl", _bench_rows())
    gray = np.linspace(0, 65535, 400).reshape(20, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gray.astype(np.uint16)).save(folder / "images" / "p00.png")
    Image.fromarray((gray / 256).astype(np.uint8)).convert("RGB").save(folder / "images" / "x.jpg", exif=exif)
    Image.fromarray(gray.astype(np.uint16)).save(folder / "images" / "x.tif")
    Image.fromarray((gray / 256).astype(np.uint8)).quantize(16).save(folder / "images" / "x.gif")
    suffixes = ["p00.png", "x.jpg", "x.tif", "x.gif"]
    _json(folder / "t.json", [{**_conversation(i), "image": name} for i, name in enumerate(suffixes)])
    rows = _bench_rows(4)
    for row, name in zip(rows[1:], suffixes, strict=True):
        row["images"] = [f"images/{name}"]
    _lines(folder / "b.jsonl", rows)


def _manifest(folder: Path) -> None:
    _labels(folder)
    builders.tiny_llava(folder / "m")
    for name in ("m.jsonl", "m.parquet"):
        _run(
            "mgll-encoder", "data", "fundus", "--labels", folder / "l.csv", "--images", folder / "images",
            "--patient-column", "patient", "--keywords-column", "keywords", "--out", folder / name,
        )  # fmt: skip


PRETRAIN = "mgll-encoder pretrain --tower-size tiny --epochs 1 --batch-size 4 --workers 0"


def _text_tower(folder: Path) -> None:
    import mgll_encoder.probing.zero_shot

    _manifest(folder)
    _run(*PRETRAIN.split(), "--manifest", folder / "m.jsonl", "--out", folder / "tt")
    packaged = json.loads((Path(mgll_encoder.probing.zero_shot.__file__).parent / "prompts.json").read_text())
    _json(folder / "prompts.json", next(iter(packaged["sets"].values())))


def _interrupted_pretraining(folder: Path) -> None:
    """A pretraining that was stopped just before its tower was written."""
    from tests.fuzz.harness import commands

    _manifest(folder)
    with mock.patch("mgll_encoder.pretraining.pretrain.save_tower", side_effect=KeyboardInterrupt):
        arguments = [*PRETRAIN.split(), "--manifest", folder / "m.jsonl", "--out", folder / "out"]
        outcome = builders.invoke(commands()["mgll-encoder"], *arguments[1:])
    assert outcome.code == 130, outcome.err


def _begun_run(folder: Path) -> None:
    _bench(folder)
    builders.tiny_llava(folder / "m")
    _run(
        "eval-mcq",
        "run",
        "--model",
        folder / "m",
        "--bench",
        folder / "b.jsonl",
        "--out",
        folder / "r",
        "--limit",
        4,
    )


def _peft(folder: Path) -> None:
    _training_rows(folder)
    options = ("--workers", 0, "--report-to", "none", "--max-steps", 1, "--out", "a")
    with contextlib.chdir(folder):  # the adapter names its base as it was given
        _run("finetune-lora", "--model", "m", *DATA.split(), *options)
    shutil.rmtree(folder / "a.training")


def _delta(folder: Path) -> None:
    _llava(folder)
    _run(
        "swap-encoder",
        "--mllm",
        folder / "m",
        "--encoder",
        folder / "t",
        "--out",
        folder / "d",
        "--delta-only",
    )


TRAINING = f"retrain-projector --model m {DATA} --workers 0 --report-to none --batch-size 4 --out o"


def _resume(folder: Path) -> None:
    _training_rows(folder)
    with contextlib.chdir(folder):
        _run(*TRAINING.split(), "--save-steps", "1", "--max-steps", "2")
    shutil.rmtree(folder / "o")
    shutil.rmtree(folder / "o.training" / "checkpoint-2", ignore_errors=True)


def _questions(folder: Path) -> None:
    _pictures(folder)
    pictures = [(folder / "images" / f"p{i:02}.png").read_bytes() for i in range(4)]
    columns = ["index", "image", "question", "A", "B", "C", "answer", "category"]
    with (folder / "q.tsv").open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t")
        writer.writerow(columns)
        for i, picture in enumerate(pictures):
            writer.writerow(
                [
                    i,
                    base64.b64encode(picture).decode(),
                    "What?",
                    "drusen",
                    "cataract",
                    "none",
                    "ABC"[i % 3],
                    "X",
                ]
            )
    shutil.copyfile(folder / "q.tsv", folder / "g.tsv")
    options = {"option_A": "drusen", "option_B": "cataract", "option_C": "nothing"}
    _json(
        folder / "omni.json",
        [
            {
                "dataset": "D", "question_id": f"d{i}", "question_type": "Disease", "question": "What?", **options,
                "gt_answer": "drusen", "image_path": f"images/p{i:02}.png", "modality_type": "Fundus",
            }
            for i in range(4)
        ],
    )  # fmt: skip
    question = (
        "Which?\nA. drusen\nB. cataract\nAnswer with the option's letter from the given choices directly."
    )
    rows = [{**_conversation(i, question), "image": f"images/p{i:02}.png"} for i in range(4)]
    for row in rows:
        row["conversations"][1]["value"] = "B"
    _json(folder / "llava.json", rows)
    problem = {
        "question": "What?",
        "choices": ["drusen", "cataract"],
        "answer": 1,
        "hint": "",
        "split": "test",
        "topic": "eye",
    }
    for i in range(4):
        shutil.copytree(folder / "images", folder / "science" / "test" / str(i))
    _json(
        folder / "science" / "problems.json", {str(i): {**problem, "image": f"p{i:02}.png"} for i in range(4)}
    )


IMPORTS: Mapping[str, str] = {
    "vlmevalkit": "q.tsv", "gmai": "g.tsv", "omnimedvqa": "omni.json", "llava": "llava.json",
    "scienceqa": "science/problems.json",
}  # fmt: skip
"""Format of ``eval-mcq import`` to its file."""


def _adapters(folder: Path) -> None:
    from tests.mllm_adapters.llava_checkpoints import lora_folder

    lora_folder(GOLDEN, "llava", folder)
    _tower(folder)


def _old_pickle(folder: Path) -> None:
    """Files that no checkpoint is: plain pickles and archives of them."""
    (folder / "x.pkl").write_bytes(pickle.dumps({"a": [1, 2.0, "x"], "b": np.zeros(3)}, protocol=2))


READERS: Sequence[Reader] = (
    Reader(
        "weights", _weights, ("w.safetensors", "w.pt", "old.pt", "official.pth"),
        ("mgll-encoder inspect {file} --json", "mgll-encoder convert {file} --out out"),
    ),
    Reader("pickles", _old_pickle, ("x.pkl",), ("mgll-encoder inspect {file}",), valid=(2,)),
    Reader("torchscript", _torchscript, ("jit.pt",), ("mgll-encoder inspect {file}",), valid=(0, 2)),
    Reader(
        "towers", _tower_folders, ("t/*", "hf/*", "clip/*"),
        ("mgll-encoder inspect {top} --json", "mgll-encoder convert {top} --out out"),
    ),
    Reader(
        "configs", _configs, ("[!t]*/config.json", "[!t]*/generation_config.json"),
        ("swap-encoder --mllm {top} --encoder t --dry-run --json",),
    ),
    Reader(
        "indexes", _sharded, ("*/*.index.json",),
        ("swap-encoder --mllm {top} --encoder t --dry-run", "swap-encoder --mllm {top} --encoder t --out out"),
    ),
    Reader(
        "shards", _configs, ("[!t]*.safetensors", "[!t]*.bin", "[!t]*.pt"),
        ("swap-encoder --mllm {top} --encoder t --dry-run", "swap-encoder --mllm {top} --encoder t --out out"),
    ),
    Reader(
        "processors", _complete("llava-hf", "qwen2_5-vl", "instructblip", "internvl", "janus-pro", "aya-vision"),
        ("[!t]*processor_config.json",),
        ("swap-encoder --mllm {top} --encoder t --out out", "eval-mcq check --model {top}"),
    ),
    Reader(
        "tokenizers", _complete("llava-hf", "llava", "qwen-vl", "med-flamingo", "internvl-internlm2"),
        (
            "*/tokenizer.json", "*/tokenizer_config.json", "*/special_tokens_map.json", "*/added_tokens.json",
            "*/tokenizer.model", "*/vocab.json", "*/merges.txt", "*/*.tiktoken",
        ),
        ("swap-encoder --mllm {top} --encoder t --out out",),
    ),
    Reader(
        "templates", _template, ("m/chat_template.jinja", "old/chat_template.json"),
        ("eval-mcq check --model {top}", "retrain-projector --model {top} " + DATA + " --dry-run"),
    ),
    Reader(
        "rows", _training_rows, ("t.json", "t.jsonl", "messages.json"),
        ("retrain-projector --model m --data {file} --images images --dry-run",),
    ),
    Reader(
        "bench-parquet", _bench, ("b.parquet",), ("eval-mcq import b.parquet --format parquet --out o.jsonl",)
    ),
    Reader(
        "bench", _bench, ("b.jsonl",),
        (
            "eval-mcq export {file} --format llava --out o.json",
            "eval-mcq export {file} --format vlmevalkit --out o.tsv",
            "eval-mcq export {file} --format lmms-eval --out o",
            "eval-mcq export {file} --format jsonl --out o.jsonl",
        ),
    ),
    Reader(
        "runs", _runs, ("r/run.json", "r/answers.jsonl"),
        (
            "eval-mcq table r --format markdown", "eval-mcq compare base=base r=r",
            "eval-mcq compare r=r base=base --format latex",
            "eval-mcq compare r=r base=base --table-layout long --format csv",
            "eval-mcq report base=base r=r --out o.html",
            "eval-mcq export b.jsonl --format vlmevalkit --run r --out o.tsv",
        ),
    ),
    Reader(
        "continued-runs", _begun_run, ("r/*",), ("eval-mcq run --model m --bench b.jsonl --out r",), stays=("r/*",)
    ),
    Reader(
        "labels", _labels, ("l.csv", "l.tsv", "l.xlsx"),
        (
            "mgll-encoder data fundus --labels {file} --images images --patient-column patient --out o.jsonl",
            "eval-mcq build --labels {file} --images images --diseases DR,AMD,Glaucoma,Cataract --min-negatives 1"
            " --out o.jsonl",
            "mgll-encoder probe --encoder t --labels {file} --images images --patient-column patient --min-positives 1"
            " --workers 0 --test-share 0.5",
        ),
    ),
    Reader(
        "presets", _preset, ("p.json",),
        (
            "eval-mcq build --labels l.csv --images images --preset p.json --diseases DR,AMD,Glaucoma,Cataract"
            " --min-negatives 1 --out o.jsonl",
        ),
    ),
    Reader(
        "explanations", _preset, ("x.json",),
        (
            "mgll-encoder data fundus --labels l.csv --images images --patient-column patient --explanations x.json"
            " --out o.jsonl",
        ),
    ),
    Reader(
        "published", _published, ("p.json",),
        ("eval-mcq audit --table p.json --format markdown", "eval-mcq audit --table p.json"),
    ),
    Reader(
        "recipes", _recipe, ("p.yaml",),
        (
            f"retrain-projector --model m {DATA} --recipe p.yaml --estimate",
            f"finetune-lora --model m {DATA} --recipe p.yaml --estimate",
            f"retrain-projector --model m {DATA} --recipe p.yaml --dry-run",
        ),
    ),
    Reader(
        "deepspeed", _deepspeed, ("ds.json",),
        (f"retrain-projector --model m {DATA} --deepspeed ds.json --dry-run",),
    ),
    Reader("dicom", _dicom, ("d/*.dcm",), ("mgll-encoder data xray --dicom d --out out --workers 1",)),
    Reader(
        "pictures", _all_kinds_of_pictures, ("images/p00.png", "images/x.*"),
        (
            f"retrain-projector --model m {DATA} --dry-run",
            "eval-mcq export b.jsonl --format parquet --out o.parquet",
            "eval-mcq export b.jsonl --format vlmevalkit --out o.tsv",
        ),
    ),
    Reader(
        "manifests", _manifest, ("m.jsonl", "m.parquet"),
        ("mgll-encoder pretrain --manifest {file} --tower-size tiny --epochs 1 --batch-size 4 --workers 0 --out out",),
        stays=(".out.training*",),
    ),
    Reader(
        "pretrainings", _interrupted_pretraining, (".out.training/*",),
        (f"{PRETRAIN} --manifest m.jsonl --out out --resume",), stays=(".out.training*",),
    ),
    Reader(
        "text-towers", _text_tower, ("tt/*",),
        ("mgll-encoder zero-shot --encoder {top} --labels l.csv --images images --min-positives 1",),
    ),
    Reader(
        "prompts", _text_tower, ("prompts.json",),
        (
            "mgll-encoder zero-shot --encoder tt --labels l.csv --images images --min-positives 1 --prompts "
            "prompts.json",
        ),
    ),
    Reader("captions", _manifest, ("m.jsonl",), ("retrain-projector --model m --data m.jsonl --dry-run",)),
    Reader("deltas", _delta, ("d/*",), ("swap-encoder compose --mllm m --delta d --out out",)),
    Reader(
        "resume", _resume, ("o.training/*",), (f"{TRAINING} --save-steps 1 --max-steps 2 --resume",),
        stays=("o.training/*",),
    ),
    *(
        Reader(f"questions-{kind}", _questions, (file,), (f"eval-mcq import {file} --format {kind} --out o.jsonl",))
        for kind, file in IMPORTS.items()
    ),
    Reader(
        "provenance", _swapped, ("s/mgll_swap.json",),
        (
            "swap-encoder verify s --quick", "swap-encoder restore s --mllm m --out out",
            "swap-encoder restore s --to-encoder --out out", "swap-encoder extract s --mllm m --out out",
        ),
    ),
    Reader("peft", _peft, ("a/*",), ("eval-mcq check --model {top}",)),
    Reader(
        "adapters", _adapters, ("lora/*.json", "lora/*.bin"),
        ("swap-encoder --mllm lora --encoder t --dry-run", "swap-encoder convert --mllm lora --out out"),
    ),
)  # fmt: skip
"""All of them, in the order of the summary."""
