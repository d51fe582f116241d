"""Questions from published label files, and invariants for any table of labels."""

import csv
import hashlib
import json
import re
import shlex
from collections import Counter

import numpy as np
import pytest

from eval_mcq import list_presets
from eval_mcq.items.askable_rows import LabelTable
from eval_mcq.items.build import Draw, SplitRule, build
from eval_mcq.items.preset import FOLDER, load_preset, preset_names
from eval_mcq.items.schema import load_bench
from mgll_encoder.common.errors import BadDataError
from tests.builders import picture
from tests.eval_mcq.helpers import write_labels
from tests.eval_mcq.test_build import PAPER_ORDER

FROZEN = {
    ("fundus-real", 1): "9767b71ad597ed48",
    ("fundus10", 1): "2d1338086529b91c",
    ("odir", 1): "5609fddb81e870ef",
    ("rfmid", 1): "6d83696ad0702114",
}
"""Name and version of a shipped preset to the hash of its content: a change of one word that is
asked needs a new version."""


def test_the_shipped_presets_are_frozen():
    content = {}
    for name in preset_names():
        data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        version = data.pop("version")
        del data["about"]  # for the reader only: no benchmark depends on it
        text = json.dumps(data, sort_keys=True)
        content[name, version] = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert content == FROZEN


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff{}", "preset .*p.json is not UTF-8 text"),
        (b"[" * 5000, "preset .*p.json: Invalid JSON: recursion limit"),
        (b'{"name": "x", "question": "?", "diseases": []}', "field 'diseases'"),
        (b'{"name": "x", "question": "?", "version": ' + b"9" * 6000 + b"}", "preset .*p.json"),
    ],
)
def test_a_file_that_is_no_preset_is_refused(tmp_path, content, said):
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(BadDataError, match=said):
        load_preset(str(tmp_path / "p.json"))


def head_of(source, folder, rows, images):
    """The first rows of a published label file, and a tiny picture for every name that ``images`` gives of a row."""
    with source.open(encoding="utf-8-sig", newline="") as stream:
        table = list(csv.DictReader(stream))[:rows]
    data = picture(folder / "photos", "one.png", size=2).read_bytes()
    for row in table:
        for name in images(row):
            (folder / "photos" / name).write_bytes(data)
    path = folder / source.name
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path, table


def test_rfmid_in_one_command(eval_mcq, real_data, tmp_path):
    source = real_data / "labels" / "RFMiD_Training_Labels.csv"
    labels, table = head_of(source, tmp_path, 600, lambda row: [f"{row['ID']}.png"])
    call = ("build", "--preset", "rfmid", "--labels", labels, "--images", tmp_path / "photos")
    assert eval_mcq(*call, "--out", tmp_path / "b.jsonl") == 0, eval_mcq.err
    bench = load_bench(tmp_path / "b.jsonl")
    true = {
        "AMD": "ARMD",
        "DR": "DR",
        "CSR": "CSR",
        "Media Haze": "MH",
        "Tessellation": "TSLN",
        "Myopia": "MYA",
    }
    asked = Counter(item.category for item in bench.items)
    assert {d: asked[d] for d in true} == {d: sum(row[c] == "1" for row in table) for d, c in true.items()}
    by_image = {f"photos/{row['ID']}.png": row for row in table}
    option = {disease.name: disease.option for disease in load_preset("rfmid").diseases}
    for item in bench.items:
        wrong = set(item.options) - {item.options[item.answer]}
        for disease, column in true.items():
            if by_image[item.images[0]][column] == "1":
                assert option[disease] not in wrong
    crs = {f"photos/{row['ID']}.png" for row in table if row["CRS"] == "1"}
    beside = [item for item in bench.items if item.images[0] in crs and item.category != "Retinitis"]
    assert beside
    assert not any("retinitis" in item.options for item in beside)
    assert bench.header.built["preset_version"] == 1


def test_odir_in_one_command_asks_each_eye_by_its_own_keywords(eval_mcq, real_data, tmp_path):
    source = real_data / "labels" / "ODIR-5K_full_df.csv"
    labels, table = head_of(source, tmp_path, 900, lambda row: [row["Left-Fundus"], row["Right-Fundus"]])
    call = ("build", "--preset", "odir", "--labels", labels, "--images", tmp_path / "photos")
    assert eval_mcq(*call, "--out", tmp_path / "b.jsonl") == 0, eval_mcq.err
    bench = load_bench(tmp_path / "b.jsonl")
    keywords = {
        row[f"{eye}-Fundus"]: row[f"{eye}-Diagnostic Keywords"] for row in table for eye in ("Left", "Right")
    }
    cataract = {name for name, words in keywords.items() if "cataract" in words.replace("，", ",").split(",")}
    asked = {item.images[0].removeprefix("photos/") for item in bench.items if item.category == "Cataract"}
    assert asked == cataract
    words_of = [keywords[item.images[0].removeprefix("photos/")] for item in bench.items]
    suspected = [
        item for item, words in zip(bench.items, words_of, strict=True) if "suspected glaucoma" in words
    ]
    assert suspected
    assert not any("glaucoma" in item.options for item in suspected)  # neither asked nor offered as wrong
    assert all(item.patient and item.source == "ODIR-5K" for item in bench.items)
    sides = {}
    for side in ("train", "test"):
        few = ("--diseases", "AMD,Cataract,DR,Glaucoma,Myopia", "--split", side)
        assert eval_mcq(*call, *few, "--out", tmp_path / f"{side}.jsonl") == 0, eval_mcq.err
        sides[side] = {item.patient for item in load_bench(tmp_path / f"{side}.jsonl").items}
    assert not sides["train"] & sides["test"]
    assert "leave the --*-column options out" in eval_mcq.refuses(
        *call, "--patient-column", "ID", "--out", tmp_path / "x.jsonl"
    )


def test_columns_of_zeros_and_ones_are_labels_as_well(eval_mcq, tmp_path):
    names = ["AMD", "DR", "Cataract", "Glaucoma"]
    rows = [
        {"file": f"{i}.png", **{name: str(int(i % 4 == n)) for n, name in enumerate(names)}}
        for i in range(20)
    ]
    labels = write_labels(tmp_path, rows)
    call = ("build", "--labels", labels, "--images", tmp_path / "photos", "--labels-column", ",".join(names))
    few = ("--diseases", ",".join(names))
    assert eval_mcq(*call, *few, "--out", tmp_path / "b.jsonl") == 0, eval_mcq.err
    items = load_bench(tmp_path / "b.jsonl").items
    assert Counter(item.category for item in items) == dict.fromkeys(names, 5)
    labels.write_text(labels.read_text().replace("3.png,0,0,0,1", "3.png,0,0,0,perhaps"))
    assert "row 5: column 'Glaucoma' is 'perhaps': expected 1, 0, yes" in eval_mcq.refuses(
        *call, *few, "--strict", "--out", tmp_path / "c.jsonl"
    )
    assert eval_mcq(*call, *few, "--out", tmp_path / "c.jsonl") == 0, eval_mcq.err
    assert "left out 1 of 20 rows: 1 cell that cannot be read" in eval_mcq.err
    assert load_bench(tmp_path / "c.jsonl").header.built["skipped"] == {"cell that cannot be read": 1}


def test_a_disease_that_is_in_nearly_every_image_is_refused(eval_mcq, tmp_path):
    rows = [{"file": f"{i}.png", "labels": "DR;AMD" if i < 6 else "DR"} for i in range(12)]
    rows += [{"file": "g.png", "labels": "glaucoma"}, {"file": "c.png", "labels": "cataract"}]
    labels, out = write_labels(tmp_path, rows), tmp_path / "b.jsonl"
    call = ("build", "--labels", labels, "--images", tmp_path / "photos", "--out", out)
    few = ("--diseases", "AMD,DR,Cataract,Glaucoma", "--options", "2")
    error = eval_mcq.refuses(*call, *few)
    assert "disease 'DR' is absent from 2 of the 14 images" in error
    assert "at least 5 must not have it" in error
    assert not (tmp_path / "b.jsonl").exists()
    assert eval_mcq(*call, *few, "--min-negatives", 2) == 0, eval_mcq.err
    assert "images without it" in eval_mcq.out


def test_hard_distractors_come_from_the_group_first(tmp_path):
    preset = load_preset("fundus10")
    rows = [
        {"file": f"{disease.name[:5]}{i}.png", "labels": disease.labels[0]}
        for disease in preset.diseases
        for i in range(30)
    ]
    table = LabelTable(write_labels(tmp_path, rows))
    by_draw = {
        hard: build(table, tmp_path / "photos", tmp_path / "b.jsonl", preset, draw=Draw(hard=hard))[1]
        for hard in (False, True)
    }
    option = {d.name: d.option for d in preset.diseases}
    near = {option[name] for name in preset.confused_with(preset.diseases[0])}  # of AMD: five
    offered = {
        hard: [{*item.options} - {option["AMD"]} for item in items if item.category == "AMD"]
        for hard, items in by_draw.items()
    }
    assert all(others <= near for others in offered[True])
    assert len(set().union(*offered[True])) == len(near)  # any of the group, not always the same
    assert not all(others <= near for others in offered[False])
    haze = [set(i.options) for i in by_draw[True] if i.category == "Media Haze"]
    assert all(
        {option["Tessellation"], option["Glaucoma"]} < options for options in haze
    )  # two near, one more
    assert all(len(options) == 4 for options in haze)
    plainer = preset.model_copy(update={"confusable": []})
    with pytest.raises(BadDataError, match="lists no confusable diseases"):
        build(table, tmp_path / "photos", tmp_path / "b.jsonl", plainer, draw=Draw(hard=True))


@pytest.mark.parametrize("seed", range(12))
def test_what_holds_for_any_table_of_labels(tmp_path, seed):
    """Random multi-label tables: one true option, no true distractor, even positions, splits by patient, repeatable."""
    generator = np.random.default_rng(seed)
    preset = load_preset("fundus10").model_copy(update={"options": int(generator.integers(2, 5))})
    diseases = preset.diseases
    data = picture(tmp_path / "photos", "one.png", size=2).read_bytes()
    rows = []
    for i in range(int(generator.integers(200, 260))):
        true = generator.choice(len(diseases), size=int(generator.integers(0, 4)), replace=False)
        spelt = [str(generator.choice(diseases[t].labels)) for t in true]
        rows.append(
            {"file": f"{i}.png", "labels": " ; ".join([*spelt, "something else"]), "patient": f"p{i // 2}"}
        )
        (tmp_path / "photos" / f"{i}.png").write_bytes(data)
    with (tmp_path / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = LabelTable(tmp_path / "labels.csv", patient="patient")
    draw = Draw(seed, hard=bool(seed % 2), min_negatives=1)
    arguments = (table, tmp_path / "photos", tmp_path / "b.jsonl", preset, SplitRule("test", 0.6, seed), draw)
    header, items, report = build(*arguments)
    assert build(*arguments)[1] == items
    labels = {
        f"photos/{row['file']}": {" ".join(x.lower().split()) for x in row["labels"].split(";")}
        for row in rows
    }
    by_option = {d.option: d for d in diseases}
    by_name = {d.name: d for d in diseases}
    for item in items:
        asked = by_name[item.category]
        assert item.options[item.answer] == asked.option
        assert len(item.options) == preset.options
        for i, option in enumerate(item.options):
            other = by_option[option]
            assert other.is_true_of(labels[item.images[0]]) == (i == item.answer)
            assert other.name not in asked.not_against
            assert i == item.answer or asked.name not in other.not_against
    for disease in header.categories:
        positions = Counter(item.answer for item in items if item.category == disease)
        assert max(positions.values()) - min(positions.get(i, 0) for i in range(preset.options)) <= 1
    every = build(*arguments[:4], SplitRule("train", 0.6, seed), draw)[1]
    assert not {item.patient for item in items} & {item.patient for item in every}
    asked_images = {item.images[0] for item in items + every}
    assert asked_images == {image for image, of in labels.items() if any(d.is_true_of(of) for d in diseases)}
    assert report.questions.total() == len(items)


def test_all_diseases_without_images_are_named_at_once_with_an_option_to_paste(eval_mcq, tmp_path):
    names = ["AMD", "DR", "Glaucoma", "Media Haze"]
    rows = [{"file": f"{name}-{i}.png", "labels": name} for name in names for i in range(3)]
    labels, out = write_labels(tmp_path, rows), tmp_path / "b.jsonl"
    call = ("build", "--labels", labels, "--images", tmp_path / "photos", "--options", "3", "--out", out)
    error = eval_mcq.refuses(*call)
    for name in set(PAPER_ORDER) - set(names):
        assert f"disease '{name}' has no image labeled" in error
    pasted = shlex.split(re.search(r"--diseases '[^']*'", error)[0])
    assert pasted == ["--diseases", ",".join(name for name in PAPER_ORDER if name in names)]
    assert eval_mcq(*call, *pasted) == 0, eval_mcq.err


def test_the_presets_are_listed_with_their_diseases(eval_mcq):
    assert eval_mcq("build", "--list") == 0, eval_mcq.err
    for preset in list_presets():
        assert preset.name in eval_mcq.out
    assert "ICLR" in eval_mcq.out
