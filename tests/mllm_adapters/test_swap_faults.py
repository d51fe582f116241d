"""What goes wrong on real machines in the midst of a swap, and what is left then: nothing, and one line."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.progress import show_with
from mllm_adapters import load_mllm
from mllm_adapters.cli.swap import main
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.swap.apply import apply_plan
from mllm_adapters.swap.verify import Verification
from tests.builders import invoke, refused
from tests.mllm_adapters.llava_checkpoints import a_tower


@pytest.fixture(scope="module")
def host(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA in several shards, the first of which holds its tower, as the published ones."""
    folder = tmp_path_factory.mktemp("hosts") / "sharded"
    shutil.copytree(tiny_llava, folder)
    (folder / "model.safetensors").unlink()
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tower(tmp_path_factory.mktemp("towers") / "mgll")


def digest(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): sha256(f.read_bytes()).hexdigest() for f in files}


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


def swap(host: Path, tower: Path, out: Path, *more: object) -> tuple[object, ...]:
    return main, "--mllm", host, "--encoder", tower, "--out", out, *more


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=(pytest.mark.slow, pytest.mark.timeout(900)))])
def test_killed_at_random_moments_it_leaves_nothing_that_loads(
    kills: int, host: Path, tower: Path, tmp_path: Path
) -> None:
    checkpoint, family, _ = open_checkpoint(host)
    plan = family.plan(checkpoint, inspect_tower(tower))
    source, out = digest(host), tmp_path / "out"

    def start() -> int:
        child = os.fork()
        if child == 0:
            apply_plan(plan, family, checkpoint, out, checked=True)
            os._exit(0)
        return child

    began = time.monotonic()
    assert os.waitpid(start(), 0)[1] == 0
    duration = time.monotonic() - began
    shutil.rmtree(out)
    moments, killed, half_done = random.Random(0), 0, 0
    while killed < kills:
        child = start()
        time.sleep(moments.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        half_done += bool(list(tmp_path.glob(".out.partial-*/model*")))
        for config in tmp_path.rglob("config.json"):  # nothing, or everything
            wrong = [
                check for check in Verification(config.parent).checks(quick=True) if check.passed is False
            ]
            assert not wrong
        if out.exists():
            shutil.rmtree(out)
    assert half_done > kills // 5, "kills hit the writing"
    assert digest(host) == source
    apply_plan(plan, family, checkpoint, out, checked=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what the killed left is cleared away"
    load_mllm(out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 300 KiB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_without_room_is_told_before_the_first_byte(host: Path, tower: Path, small_disk: Path) -> None:
    message = refused(*swap(host, tower, small_disk / "out"))
    assert f"{small_disk} has 307.2 kB free, but " in message
    assert "are to be written: free " in message
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_one_line_and_leaves_nothing(
    host: Path, tower: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else writes at the same time: the check has passed, and yet there is no room."""
    monkeypatch.setattr("mllm_adapters.swap.writer.check_space", lambda *_: None)
    message = refused(*swap(host, tower, small_disk / "out"))
    assert "cannot be written" in message
    assert "No space left on device" in message
    assert list(small_disk.iterdir()) == []


def test_a_write_that_fails_in_the_midst_leaves_nothing(host: Path, tower: Path, tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, old[1]))
    try:
        message = refused(*swap(host, tower, tmp_path / "full" / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "cannot be written" in message
    assert list((tmp_path / "full").iterdir()) == []


@pytest.mark.parametrize("kind", ["host", "tower", "training checkpoint"])
def test_a_source_that_is_cut_short_meanwhile_is_told_and_leaves_nothing(
    kind: str, host: Path, tower: Path, tmp_path: Path
) -> None:
    """A download that starts over, say. (In a process of its own: a mapped file would end it with SIGBUS.)"""
    (tmp_path / "in").mkdir()
    source, encoder = copied(host, tmp_path / "in" / "host"), copied(tower, tmp_path / "in" / "tower")
    if kind == "training checkpoint":
        torch.save({"model": load_file(encoder / "model.safetensors")}, tmp_path / "in" / "tower.pt")
        (encoder / "model.safetensors").rename(tmp_path / "in" / "whole")
        encoder = tmp_path / "in" / "tower.pt"
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint, inspect_tower(encoder, activation="gelu"))
    doomed = (
        source.glob("*.safetensors") if kind == "host" else (tmp_path / "in").glob("tower*/*.safetensors")
    )
    files = [encoder] if encoder.is_file() else list(doomed)

    def cut_short(_: int) -> None:
        for file in files:
            os.truncate(file, min(file.stat().st_size, 8192))

    told = tmp_path / "in" / "told"
    child = os.fork()
    if child == 0:
        show_with(None, byte_counter=lambda *_: nullcontext(cut_short))
        try:
            apply_plan(plan, family, checkpoint, tmp_path / "out", checked=True, copy=True)
        except UserError as error:
            told.write_text(str(error))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert re.search(r"(safetensors|tower\.pt) (was truncated|is truncated or damaged)", told.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_another_swap_into_the_same_folder_is_told(host: Path, tower: Path, tmp_path: Path) -> None:
    from mgll_encoder.common.files import new_folder

    with new_folder(tmp_path / "out"):
        message = refused(*swap(host, tower, tmp_path / "out"))
    assert f"(it holds the lock {tmp_path / '.out.lock'})" in message


def cut(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[-1]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    return f"{file.name} is truncated or damaged"


def lost(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.unlink()
    return f"shard {file.name} is missing: complete the download"


def twice(folder: Path) -> str:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: value}, second, metadata={"format": "pt"})
    return f"tensor {name} is in both {first.name} and {second.name}"


def reshaped(folder: Path) -> str:
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        for name in [name for name in state if name.endswith("layers.0.mlp.up_proj.weight")]:
            save_file({**state, name: torch.zeros(7, 48)}, file, metadata={"format": "pt"})
    return "1 mismatched tensors, first model.language_model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("damage", [cut, lost, twice, reshaped])
def test_a_damaged_source_is_refused_before_anything_is_written(
    damage: Callable[[Path], str], host: Path, tower: Path, tmp_path: Path
) -> None:
    broken = copied(host, tmp_path / "broken")
    expected = damage(broken)
    assert expected in refused(*swap(broken, tower, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_tensor_of_another_dtype_than_config_says_stays_as_it_is(
    host: Path, tower: Path, tmp_path: Path
) -> None:
    """Checkpoints of mixed dtypes are published (norms in float32); loading converts, a swap does not."""
    mixed = copied(host, tmp_path / "mixed")
    file = next(
        f for f in sorted(mixed.glob("*.safetensors")) if any("norm" in name for name in load_file(f))
    )
    state = load_file(file)
    name = next(name for name in state if "norm" in name and "vision" not in name)
    save_file({**state, name: state[name].double()}, file, metadata={"format": "pt"})
    assert invoke(*swap(mixed, tower, tmp_path / "out")).code == 0
    assert open_checkpoint(tmp_path / "out")[0].tensors[name].dtype == torch.float64
    assert all(check.passed for check in Verification(tmp_path / "out").checks())


def test_a_source_that_can_only_be_read_is_enough(host: Path, tower: Path, tmp_path: Path) -> None:
    source = copied(host, tmp_path / "source")
    for path in [*source.iterdir(), source]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = digest(source)
    try:
        assert invoke(*swap(source, tower, tmp_path / "out")).code == 0
        assert (tmp_path / "out" / "tokenizer_config.json").stat().st_mode & 0o200, "copies can be written"
        assert digest(source) == before
    finally:
        source.chmod(0o755)


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    folder = shared / f"mgll-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_an_output_on_another_file_system_is_copied(
    host: Path, tower: Path, tmp_path: Path, other_disk: Path
) -> None:
    assert invoke(*swap(host, tower, other_disk / "out")).code == 0
    assert invoke(*swap(host, tower, tmp_path / "out")).code == 0
    here, there = digest(tmp_path / "out"), digest(other_disk / "out")
    assert here == there
    assert max(file.stat().st_nlink for file in (other_disk / "out").iterdir()) == 1


def test_a_checkpoint_in_the_cache_of_the_hub_is_linked_to_its_blobs(
    host: Path, tower: Path, tmp_path: Path
) -> None:
    repo = tmp_path / "hub" / "models--org--llava"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in host.iterdir():
        blob = repo / "blobs" / sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    before, out = digest(repo), tmp_path / "out"
    assert invoke(*swap(snapshot, tower, out)).code == 0
    assert digest(repo) == before
    assert not any(path.is_symlink() for path in out.iterdir())
    linked = [file for file in out.iterdir() if file.stat().st_nlink > 1]
    assert linked
    record = json.loads((out / "mgll_swap.json").read_text())
    source = record["inputs"]["source"]
    assert (source["hub_id"], source["revision"]) == ("org/llava", "0123abc")
    for file in linked:  # known whole without having been read
        assert record["files"][file.name]["sha256"] == sha256(file.read_bytes()).hexdigest()
    assert "base_model: org/llava" in (out / "README.md").read_text()
    load_mllm(out)


def test_what_is_done_to_an_output_later(host: Path, tower: Path, tmp_path: Path) -> None:
    """Writing anew leaves the source alone; writing into a linked file does not, unless it was copied."""
    source = copied(host, tmp_path / "source")
    linked, own = tmp_path / "linked", tmp_path / "own"
    assert invoke(*swap(source, tower, linked)).code == 0
    assert "to copy unchanged" in invoke(*swap(source, tower, own, "--copy")).out
    before = digest(source)
    shared = next(file for file in linked.glob("*.safetensors") if file.stat().st_nlink > 1)
    assert all(file.stat().st_nlink == 1 for file in own.iterdir())
    assert digest(own).keys() == digest(linked).keys()

    state = {name: value + 1 for name, value in load_file(shared).items()}
    model, _ = load_mllm(linked)
    model.save_pretrained(linked, max_shard_size="100KB")
    save_file(state, own / shared.name)
    assert digest(source) == before, "transformers and safetensors make new files"

    assert invoke(*swap(source, tower, linked, "--force")).code == 0
    with shared.open("r+b") as stream:  # what no library does, but a tool may
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    assert digest(source) != before, "this is what --copy is for"


class Planted:
    """Something that is run when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_an_encoder_that_carries_code_is_refused_and_nothing_is_run(
    zipped: bool, host: Path, tower: Path, tmp_path: Path
) -> None:
    trace, encoder = tmp_path / "trace", tmp_path / "encoder.pt"
    content = {**load_file(tower / "model.safetensors"), "extra": Planted(trace)}
    torch.save(content, encoder, _use_new_zipfile_serialization=zipped)
    message = refused(*swap(host, encoder, tmp_path / "out"))
    assert "would create objects other than tensors on loading" in message
    assert "nothing was run" in message
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.pt"]
    torch.load(encoder, weights_only=False)
    assert trace.exists(), "the trap works"


def test_a_pickle_that_calls_itself_a_shard_is_refused_too(host: Path, tower: Path, tmp_path: Path) -> None:
    source = copied(host, tmp_path / "source")
    for file in source.glob("model*"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Planted(tmp_path / "trace")}, protocol=2))
    assert "refused, nothing was run" in refused(*swap(source, tower, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_copied_and_linked_are_equal(host: Path, tower: Path, tmp_path: Path) -> None:
    results = {}
    for name, more in {"linked": (), "copied": ("--copy",)}.items():
        assert invoke(*swap(host, tower, tmp_path / name, *more)).code == 0
        results[name] = SimpleNamespace(digest=digest(tmp_path / name))
    assert results["linked"] == results["copied"]
