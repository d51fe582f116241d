"""Words about patients are planted in all inputs, and searched in all outputs.

``pytest tests/test_privacy.py -s -m ''`` prints the table of what was planted and where it was looked for: every file
that the commands wrote (raw bytes; what is inside archives, Parquet and base64; the metadata of every picture), what
they printed, and the cache. Image paths are the one exception, and are listed with it: manifests, benches and the
training rows made of them refer to images by path, so files should be named after no patient.
"""

import base64
import csv
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.table import Table

from eval_mcq.cli.main import main as eval_mcq
from mgll_encoder.cli import main as mgll_encoder
from mgll_encoder.common.pseudonyms import KEY_FILE, KEY_VARIABLE
from mllm_adapters.cli.lora import main as finetune_lora
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.cli.swap import main as swap_encoder
from tests.builders import invoke
from tests.mgll_encoder.radiographs import radiograph, ramp

PLANTED = {
    "patient column": "Vexholm",
    "another column of the table": "Quorvik",
    "EXIF, XMP and comment of a JPEG": "Zintrow",
    "text chunks of a PNG": "Pludnaz",
    "bytes after the end of a picture": "Gromwex",
    "folder of a patient's DICOM files": "Hjaldvo",
    "name of a DICOM file": "Tsovrek",
    "name, id and birth date of a DICOM header": "Wuzikal",
    "series description that holds the name": "Wuzikal",
    "folder of an image": "Drimfost",
}
"""What a string was planted in -> the string."""

BY_PATH = ("manifest.jsonl", "bench.jsonl", "train.jsonl", "train.json", "messages.json", "rows", "rendered")
"""Files and cache folders that refer to images by path."""

PATH = "folder of an image"

DISEASES = {"AMD": "age-related macular degeneration", "DR": "diabetic retinopathy", "Cataract": "cataract",
            "Glaucoma": "glaucoma"}  # fmt: skip


@pytest.fixture
def hospital(tmp_path: Path, photographs: Path) -> Path:
    """A folder of photographs, their table and radiographs, with words about patients everywhere."""
    folder = tmp_path / "hospital"
    sources = sorted(photographs.rglob("*.jpg"))
    rows = []
    for i in range(48):
        name = f"{PLANTED[PATH]}{i // 24}/{i}.{'jpg' if i % 2 else 'png'}"
        marked(sources[i // 2], folder / name, i)
        rows.append(
            {
                "file": name,
                "labels": list(DISEASES.values())[i % 4],
                "patient_id": f"{PLANTED['patient column']} {i // 2}",
                "remarks": PLANTED["another column of the table"],
            }
        )
    with (folder / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for i in range(4):
        name = f"{PLANTED['name of a DICOM file']}{i}.dcm"
        ward_name = PLANTED["folder of a patient's DICOM files"]
        who = PLANTED["name, id and birth date of a DICOM header"]
        radiograph(
            folder / "dicom" / f"{ward_name}{i}" / name, ramp(900 + i),
            PatientName=f"{who}^Eve", PatientID=f"{who}-7", PatientComments=who, SeriesDescription=f"PA {who}",
        )  # fmt: skip
    return folder


def marked(source: Path, target: Path, number: int) -> None:
    """A copy of a photograph, slightly darker with its number, with words in all metadata of its format."""
    target.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(source).convert("RGB").resize((64, 64)).point(lambda value: max(0, value - number))
    words, chunk = PLANTED["EXIF, XMP and comment of a JPEG"], PLANTED["text chunks of a PNG"]
    if target.suffix == ".jpg":
        exif = Image.Exif()
        exif[0x010E], exif[0x013B] = words, words  # ImageDescription, Artist
        image.save(target, exif=exif, comment=words.encode(), xmp=words.encode(), icc_profile=words.encode())
    else:
        info = PngInfo()
        info.add_text("Patient", chunk)
        info.add_text("Comment", chunk * 20, zip=True)
        info.add_itxt("XML:com.adobe.xmp", chunk)
        image.save(target, pnginfo=info)
    with target.open("ab") as stream:
        stream.write(PLANTED["bytes after the end of a picture"].encode())


class Ward:
    """Runs commands, and keeps what they print."""

    def __init__(self, out: Path) -> None:
        self.out, self.said = out, ""
        out.mkdir()

    def __call__(self, main: object, *arguments: object, code: int = 0) -> None:
        done = invoke(main, *arguments)
        self.said += done.out + done.err
        assert done.code == code, done.err


def everything(path: Path) -> Iterator[tuple[str, bytes]]:
    """A file's bytes and everything packed into it, as (kind, bytes)."""
    data = path.read_bytes()
    yield "raw", data
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (("archive", archive.read(name)) for name in archive.namelist())
    if data[:4] == b"PAR1":
        table = pq.read_table(path)
        yield "Parquet", repr(table.to_pydict()).encode() + repr(table.schema.metadata).encode()
        yield from (("picture", cell) for cell in bytes_in(table.to_pylist()))
    for text in re.findall(rb"[A-Za-z0-9+/]{200,}={0,2}", data):
        decoded = base64.b64decode(text + b"=" * (-len(text) % 4))
        yield "base64", decoded
        yield "picture", decoded
    yield "picture", data


def bytes_in(value: object) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        yield from bytes_in(list(value.values()))
    elif isinstance(value, list):
        for inner in value:
            yield from bytes_in(inner)


def words_of(picture: bytes) -> bytes | None:
    """All metadata of a picture; None if the file is not a picture."""
    try:
        with Image.open(io.BytesIO(picture)) as image:
            image.load()
            return repr((dict(image.getexif()), image.info)).encode()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return None


def found_in(files: list[Path], top: Path) -> tuple[dict[str, set[str]], int]:
    """Planted string -> its locations; and the number of pictures searched."""
    found: dict[str, set[str]] = {word: set() for word in PLANTED.values()}
    pictures = 0
    for file in files:
        name = file.relative_to(top).as_posix()
        for kind, data in (("name", name.encode()), *everything(file)):
            held = data
            if kind == "picture":
                said = words_of(data)
                pictures += said is not None
                held = data + (said or b"")
            for word, places in found.items():
                if word.encode() in held or word.encode("utf-16-le") in held:
                    places.add(f"{name} ({kind})")
    return found, pictures


def look_everywhere(ward: Ward, cache: Path) -> None:
    """Check that no planted string occurs anywhere, and print the table."""
    grid = Table(
        "planted in", "string", "outputs", "printed", "cache", title="Planted strings, and where they are"
    )
    outputs = [file for file in ward.out.rglob("*") if file.is_file()]
    kept = [file for file in cache.rglob("*") if file.is_file()]
    (found, pictures), (cached, _) = found_in(outputs, ward.out), found_in(kept, cache)
    wrong = {}
    for place, word in PLANTED.items():
        said = [line for line in ward.said.splitlines() if word in line]
        places = [sorted(held[word]) for held in (found, cached)]
        by_path = [[name for name in held if place == PATH and name.startswith(BY_PATH)] for held in places]
        cells = [
            f"{len(held) - len(paths)}" + (f" (and {len(paths)} that refer to it)" if paths else "")
            for held, paths in zip(places, by_path, strict=True)
        ]
        grid.add_row(place, word, cells[0], str(len(said)), cells[1])
        leaked = [
            name for held, paths in zip(places, by_path, strict=True) for name in held if name not in paths
        ]
        if leaked or said:
            wrong[place] = leaked or said[:3]
    grid.caption = (
        f"{len(outputs)} files of outputs, {pictures} pictures in them, {len(kept)} files of the cache, "
        f"{len(ward.said.splitlines())} printed lines"
    )
    Console(width=140).print(grid)
    assert pictures > 20
    assert not wrong
    assert not [file for file in outputs if file.name == KEY_FILE]


@pytest.fixture
def ward(hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ward:
    """Data sets and benchmarks built from the hospital's files."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    ward = Ward(tmp_path / "out")
    labels = ("--labels", hospital / "labels.csv", "--images", hospital)
    ward(mgll_encoder, "data", "fundus", *labels, "--test-share", 0.5, "--out", ward.out / "manifest.jsonl")
    ward(mgll_encoder, "data", "xray", "--dicom", hospital / "dicom", "--out", ward.out / "xray", "--patient-folders",
         "--workers", 1)  # fmt: skip
    build = ("build", *labels, "--diseases", ",".join(DISEASES), "--min-negatives", 1)
    ward(eval_mcq, *build, "--split", "test", "--test-share", 0.5, "--out", ward.out / "bench.jsonl")
    ward(eval_mcq, *build, "--split", "train", "--test-share", 0.5, "--out", ward.out / "train.jsonl")
    assert (hospital / KEY_FILE).stat().st_mode & 0o777 == 0o600
    return ward


def exports(ward: Ward) -> None:
    bench = ward.out / "bench.jsonl"
    ward(eval_mcq, "export", ward.out / "train.jsonl", "--format", "llava", "--out", ward.out / "train.json")
    for form, name in {"vlmevalkit": "b.tsv", "lmms-eval": "task", "parquet": "b.parquet",
                       "messages": "messages.json"}.items():  # fmt: skip
        ward(eval_mcq, "export", bench, "--format", form, "--out", ward.out / name)
    ward(eval_mcq, "import", ward.out / "b.parquet", "--format", "parquet", "--out", ward.out / "again.jsonl")
    ward(eval_mcq, "import", ward.out / "b.tsv", "--format", "vlmevalkit", "--out", ward.out / "tsv.jsonl")


def runs(ward: Ward, **models: Path) -> None:
    bench = ward.out / "bench.jsonl"
    for name, model in models.items():
        ward(
            eval_mcq, "run", "--model", model, "--bench", bench, "--out", ward.out / name, "--batch-size", 64
        )
    arms = [f"{name}={ward.out / name}" for name in models]
    ward(eval_mcq, "compare", *arms, "--format", "markdown", "--out", ward.out / "table.md")
    ward(eval_mcq, "report", *arms, "--out", ward.out / "page.html", "--assets", ward.out / "assets")
    ward(eval_mcq, "report", *arms, "--out", ward.out / "inlined.html")


def test_the_search_finds_what_was_planted(hospital: Path) -> None:
    names = [file for file in hospital.rglob("*") if file.is_file()]
    found, pictures = found_in(names, hospital)
    assert pictures == 48
    assert all(found.values()), found
    places = {place.rpartition(" ")[2] for place in found[PLANTED["text chunks of a PNG"]]}
    assert {"(raw)", "(picture)"} <= places


def test_nothing_planted_leaves_by_an_evaluation(ward: Ward, tiny_llava: Path, tmp_path: Path) -> None:
    exports(ward)
    runs(ward, base=tiny_llava, other=tiny_llava)
    look_everywhere(ward, tmp_path / "cache")


@pytest.mark.slow
def test_nothing_planted_leaves_by_a_training(
    ward: Ward, hospital: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    exports(ward)
    out, manifest = ward.out, ward.out / "manifest.jsonl"
    ward(mgll_encoder, "pretrain", "--manifest", manifest, "--tower-size", "tiny", "--epochs", 1, "--batch-size", 8,
         "--workers", 0, "--out", out / "tower")  # fmt: skip
    ward(mgll_encoder, "probe", "--encoder", out / "tower", "--labels", hospital / "labels.csv", "--images", hospital,
         "--min-positives", 1, "--out", out / "probe.json", "--workers", 0)  # fmt: skip
    ward(swap_encoder, "--mllm", tiny_llava, "--encoder", out / "tower", "--align", manifest,
         "--out", out / "swapped")  # fmt: skip
    data = ("--data", out / "train.json", "--images", out, "--workers", 0, "--max-steps", 2)
    ward(retrain_projector, "--model", out / "swapped", *data, "--out", out / "aligned")
    ward(finetune_lora, "--model", out / "aligned", *data, "--merge", "--out", out / "lora")
    runs(ward, base=tiny_llava, mgll=out / "lora-merged")
    ward(
        eval_mcq,
        "run",
        "--model",
        out / "lora",
        "--bench",
        out / "train.jsonl",
        "--out",
        out / "leak",
        code=2,
    )
    ward(eval_mcq, "run", "--model", out / "lora", "--bench", out / "train.jsonl", "--out", out / "leak",
         "--allow-leak")  # fmt: skip
    assert "were seen in training" in ward.said
    look_everywhere(ward, tmp_path / "cache")
