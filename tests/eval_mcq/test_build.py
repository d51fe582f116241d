import json
from collections import Counter

import pytest

from eval_mcq.items.askable_rows import LabelTable
from eval_mcq.items.build import Draw, SplitRule, build
from eval_mcq.items.preset import load_preset, preset_names
from eval_mcq.items.schema import bench_text, load_bench
from mgll_encoder.common.errors import BadDataError, UnknownNameError
from tests.eval_mcq.helpers import write_labels

PAPER_ORDER = [
    "AMD", "Cataract", "CSR", "DR", "Glaucoma", "Media Haze", "Myopia", "Retinitis", "DME", "Tessellation",
]  # fmt: skip


def labels_of_all_ten(copies: int = 5) -> list[dict[str, str]]:
    return [
        {
            "file": f"{disease.name}-{i}.png".replace(" ", "_"),
            "labels": disease.labels[0],
            "patient": f"{disease.name}{i}",
        }
        for disease in load_preset("fundus10").diseases
        for i in range(copies)
    ]


def build_from(tmp_path, rows, preset="fundus10", split=None, seed=0, **columns):
    table = LabelTable(write_labels(tmp_path, rows), patient="patient", **columns)
    chosen = load_preset(preset) if isinstance(preset, str) else preset
    return build(table, tmp_path / "photos", tmp_path / "bench.jsonl", chosen, split, Draw(seed))


def test_the_default_preset_is_the_table_of_the_paper():
    assert [disease.name for disease in load_preset("fundus10").diseases] == PAPER_ORDER
    assert preset_names() == ["fundus-real", "fundus10", "odir", "rfmid"]


def test_every_image_becomes_a_question_with_one_true_option(tmp_path):
    header, items, report = build_from(tmp_path, labels_of_all_ten())
    options = {disease.name: disease.option for disease in load_preset("fundus10").diseases}
    assert header.categories == PAPER_ORDER
    assert report.questions == Counter(dict.fromkeys(PAPER_ORDER, 5))
    assert all(item.options[item.answer] == options[item.category] for item in items)
    assert all(len(item.options) == 4 for item in items)
    (tmp_path / "bench.jsonl").write_text(bench_text(header, items))
    assert load_bench(tmp_path / "bench.jsonl").items == items


def test_true_options_are_dealt_evenly_over_the_positions(tmp_path):
    _, items, report = build_from(tmp_path, labels_of_all_ten(copies=8))
    assert set(report.positions.values()) == {20}
    for disease in PAPER_ORDER:
        assert set(Counter(item.answer for item in items if item.category == disease).values()) == {2}


def test_what_else_is_true_of_an_image_is_never_offered_as_wrong(tmp_path):
    rows = labels_of_all_ten(1)
    rows += [{"file": f"m{i}.png", "labels": "Glaucoma; DR ;AMD;other", "patient": str(i)} for i in range(12)]
    _, items, _ = build_from(tmp_path, rows)
    multi = [item for item in items if item.images[0].startswith("photos/m")]
    assert Counter(item.category for item in multi) == {"AMD": 12, "DR": 12, "Glaucoma": 12}
    true = {"glaucoma", "diabetic retinopathy", "age-related macular degeneration"}
    assert all(len(true & set(item.options)) == 1 for item in multi)
    assert {option for item in multi for option in item.options} > true  # the others do occur


def test_what_a_label_leaves_unsaid_is_not_offered_either(tmp_path):
    _, items, _ = build_from(tmp_path, labels_of_all_ten(copies=20))
    offered = {c: {o for item in items if item.category == c for o in item.options} for c in PAPER_ORDER}
    assert "media haze" not in offered["Cataract"]
    assert "cataract" not in offered["Media Haze"]
    assert "diabetic macular edema" not in offered["DR"]
    assert "media haze" in offered["DR"]


def test_the_same_seed_gives_the_same_bench_and_new_rows_change_no_old_distractors(tmp_path):
    rows = labels_of_all_ten()
    first = build_from(tmp_path, rows)
    assert build_from(tmp_path, rows)[:2] == first[:2]
    assert build_from(tmp_path, rows, seed=1)[1] != first[1]
    more = {i.id: set(i.options) for i in build_from(tmp_path, labels_of_all_ten(6))[1]}
    assert all(more[item.id] == set(item.options) for item in first[1])


def test_both_eyes_of_a_patient_fall_on_one_side_of_the_split(tmp_path):
    rows = [
        {**row, "file": f"{eye}-{row['file']}"} for row in labels_of_all_ten(12) for eye in ("left", "right")
    ]
    sides = {side: build_from(tmp_path, rows, split=SplitRule(side))[1] for side in ("train", "test")}
    patients = {side: {item.patient for item in items} for side, items in sides.items()}
    assert not patients["train"] & patients["test"]
    assert sum(len(items) for items in sides.values()) == len(rows)


def test_rows_without_a_patient_are_their_own_patient(tmp_path):
    rows = [{**row, "patient": ""} for row in labels_of_all_ten(12)]
    _, items, report = build_from(tmp_path, rows, split=SplitRule("test"))
    assert report.without_patient == 120
    assert 0 < len(items) < 120
    assert report.patients == report.questions


def test_a_question_with_options_of_its_own_stays_within_its_source_and_is_balanced(tmp_path):
    with_edema = "diabetic retinopathy;diabetic macular edema"
    rows = [{"file": f"e{i}.png", "labels": with_edema, "dataset": "IDRiD (CODRAS copy)"} for i in range(9)]
    rows += [
        {"file": f"d{i}.png", "labels": "diabetic retinopathy", "dataset": "IDRiD (CODRAS copy)"}
        for i in range(4)
    ]
    preset = load_preset("fundus-real")
    rows += [
        {"file": f"{d.name}.png", "labels": d.labels[0], "dataset": "ODIR-5K"}
        for d in preset.diseases
        if not d.choices
    ]
    table = LabelTable(write_labels(tmp_path, rows), source="dataset")
    _, items, report = build(table, tmp_path / "photos", tmp_path / "b.jsonl", preset)
    edema = [item for item in items if item.category == "DME"]
    assert report.questions["DME"] == 8
    assert Counter(item.options[item.answer] for item in edema) == {
        "diabetic retinopathy with macular edema": 4,
        "diabetic retinopathy without macular edema": 4,
    }
    assert Counter(item.answer for item in edema) == {0: 4, 1: 4}
    assert report.questions["DR"] == 1  # retinopathy of the other source is not asked: its look would tell
    assert not any("macular edema" in o for item in items if item.category != "DME" for o in item.options)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"labels": "glaucomma"}, "row 12: unknown disease 'glaucomma': did you mean 'glaucoma'?"),
        ({"file": "AMD-0.png"}, "row 2: labels and patient of the image differ from those of label file"),
        ({"file": ""}, "row 12: column 'file' is blank"),
        (
            {"labels": "AMD;DR;glaucoma;cataract;myopia;CSR;retinitis"},
            "row 12 leaves 2 distractors for 'Cataract'",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, said):
    rows = [*labels_of_all_ten(1), {"file": "new.png", "labels": "dr", "patient": "x"}]
    path = write_labels(tmp_path, rows)
    path.write_text(path.read_text().replace("new.png,dr,x", ",".join({**rows[-1], **row}.values())))
    with pytest.raises(BadDataError) as error:
        build(
            LabelTable(path), tmp_path / "photos", tmp_path / "b.jsonl", load_preset("fundus10"), strict=True
        )
    assert said in str(error.value)


def test_a_disease_without_images_is_refused_unless_it_is_left_out(tmp_path):
    rows = [row for row in labels_of_all_ten() if "CSR" not in row["file"]]
    with pytest.raises(
        BadDataError, match=r"disease 'CSR' has no image labeled.*`diseases='AMD,Cataract,DR,"
    ):
        build_from(tmp_path, rows)
    names = [name for name in PAPER_ORDER if name != "CSR"]
    header, items, _ = build_from(tmp_path, rows, load_preset("fundus10").only(names))
    assert header.categories == names
    assert not any("serous" in option for item in items for option in item.options)


def test_an_unknown_disease_or_preset_is_answered_with_a_suggestion():
    with pytest.raises(UnknownNameError, match="did you mean 'Glaucoma'"):
        load_preset("fundus10").only(["AMD", "glaukoma"])
    with pytest.raises(UnknownNameError, match="did you mean 'fundus10'"):
        load_preset("fundus-10")


def test_a_preset_of_ones_own_is_checked(tmp_path):
    disease = {"name": "A", "option": "a", "labels": ["a"]}
    path = tmp_path / "own.json"
    preset = {
        "name": "own",
        "question": "?",
        "options": 2,
        "diseases": [disease, {**disease, "name": "B", "option": "b"}],
    }
    path.write_text(json.dumps(preset))
    assert load_preset(str(path)).options == 2
    preset["diseases"][1]["not_against"] = ["C"]
    path.write_text(json.dumps(preset))
    with pytest.raises(BadDataError, match="'B' is not_against 'C', which is not a disease of the preset"):
        load_preset(str(path))


def test_the_real_preset_asks_for_diseases_with_twenty_test_images_and_never_across_sources(
    real_data, tmp_path
):
    fundus = real_data / "fundus"
    table = LabelTable(fundus / "manifest.csv", patient="patient_or_source_id", source="dataset")
    preset = load_preset("fundus-real")
    _, items, report = build(table, fundus, tmp_path / "b.jsonl", preset, SplitRule("test"))
    assert set(report.questions) == {disease.name for disease in preset.diseases}
    assert min(n for disease, n in report.questions.items() if disease != "DME") >= 20
    for category in report.questions:
        assert len({item.source for item in items if item.category == category}) == 1
