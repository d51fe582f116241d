"""A user has a published data set in its published layout, and selects it by name."""

import csv
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel

from mgll_encoder import Tower, TowerSpec, save_tower
from mgll_encoder.cli import main
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.data.label_table import LabeledImages
from mgll_encoder.probing.benchmarks import FINETUNE, LINEAR, benchmark, benchmarks, published_figures
from mgll_encoder.probing.labeled_set import LabeledSet
from tests import builders
from tests.builders import invoke, picture, refused


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        picture((folder / name).parent, Path(name).name, size=8)
    return folder


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def excel(path: Path, rows: list[list[object]]) -> Path:
    workbook = pytest.importorskip("openpyxl").Workbook()
    for row in rows:
        workbook.active.append(row)
    workbook.save(path)
    return path


def labels_of(found: LabeledImages) -> dict[str, str]:
    return {
        path.name: ";".join(name for name, true in zip(found.names, row, strict=True) if true)
        for path, row in zip(found.images, found.truth, strict=True)
    }


def test_rfmid(tmp_path: Path, real_data: Path) -> None:
    head = (
        (real_data / "labels" / "RFMiD_Training_Labels.csv").read_text(encoding="utf-8-sig").splitlines()[0]
    )
    columns = head.split(",")

    def row(number: int, *positive: str) -> str:
        return ",".join(
            [
                str(number),
                str(int(bool(positive))),
                *("1" if name in positive else "0" for name in columns[2:]),
            ]
        )

    training = table(
        tmp_path / "RFMiD_Training_Labels.csv", "\n".join([head, row(1, "DR"), row(2, "DR", "MH"), row(3)])
    )
    testing = table(tmp_path / "RFMiD_Testing_Labels.csv", "\n".join([head, row(1, "MH"), row(2)]))
    pictures(tmp_path / "Training", "1.png", "2.png", "3.png")
    pictures(tmp_path / "Test", "1.png", "2.png")
    found = LabeledSet(
        training, tmp_path / "Training", "rfmid", test_labels=testing, test_images=tmp_path / "Test"
    ).read(Skipped())
    assert found.names == ("DR", "MH")
    assert found.test.tolist() == [False, False, False, True, True]
    assert found.truth.tolist() == [
        [True, False],
        [True, True],
        [False, False],
        [False, True],
        [False, False],
    ]
    assert not found.divided, "the image 1 of one table is not that of the other"
    assert benchmark("rfmid").in_words["ODPM"] == "optic disc pit maculopathy"


def test_adam_is_labelled_by_its_folders(tmp_path: Path) -> None:
    pictures(
        tmp_path / "Training400",
        *(f"AMD/A{i:04}.jpg" for i in range(9)),
        *(f"Non-AMD/N{i:04}.jpg" for i in range(9)),
    )
    found = LabeledSet(None, tmp_path, "adam").read(Skipped())
    assert found.exclusive
    assert labels_of(found) == {f"A{i:04}.jpg": "amd" for i in range(9)} | {
        f"N{i:04}.jpg": "non-amd" for i in range(9)
    }


def test_refuge_trains_on_folders_and_is_tested_on_an_excel_file(tmp_path: Path) -> None:
    pictures(tmp_path / "Training400", "Glaucoma/g0001.jpg", "Glaucoma/g0002.jpg", "Non-Glaucoma/n0001.jpg")
    pictures(tmp_path / "Test400", "T0001.jpg", "T0002.jpg")
    head = ["ID", "ImgName", "Label(Glaucoma=1)", "Fovea_X", "Fovea_Y"]
    test = excel(
        tmp_path / "Glaucoma_label_and_Fovea_location.xlsx",
        [head, [1, "T0001.jpg", 0, 1086.5, 1050.1], [2, "T0002.jpg", 1, 1086.5, None]],
    )
    found = LabeledSet(
        None, tmp_path / "Training400", "refuge", test_labels=test, test_images=tmp_path / "Test400"
    ).read(Skipped())
    assert labels_of(found) == {
        "g0001.jpg": "1",
        "g0002.jpg": "1",
        "n0001.jpg": "0",
        "T0001.jpg": "0",
        "T0002.jpg": "1",
    }
    assert found.test.tolist() == [False] * 3 + [True] * 2
    validation = table(
        tmp_path / "v.csv",
        "ID,ImgName,Fovea_X,Fovea_Y,Glaucoma Label\n1,T0001.jpg,1,1,0\n2,T0002.jpg,1,1,1\n",
    )
    again = LabeledSet(validation, tmp_path / "Test400", "refuge", test_share=0.5, split_seed=0).read(
        Skipped()
    )
    assert labels_of(again) == {"T0001.jpg": "0", "T0002.jpg": "1"}


def test_palm_tells_the_class_by_a_letter_or_by_a_table(tmp_path: Path) -> None:
    pictures(tmp_path / "t", *(f"{letter}{i:04}.jpg" for letter in "PHN" for i in range(4)))
    found = labels_of(LabeledSet(None, tmp_path / "t", "palm").read(Skipped()))
    assert {name[0]: label for name, label in found.items()} == {"P": "1", "H": "0", "N": "0"}
    path = table(
        tmp_path / "p.csv", "ID,imgName,Label,Fovea_X,Fovea_Y\n1,P0001.jpg,0,1,1\n2,N0000.jpg,1,1,1\n"
    )
    assert labels_of(LabeledSet(path, tmp_path / "t", "palm", test_share=0.5, split_seed=1).read(Skipped())) == {
        "P0001.jpg": "0", "N0000.jpg": "1",
    }  # fmt: skip


def test_idrid_has_grades_and_a_risk(tmp_path: Path) -> None:
    pictures(tmp_path / "a", "IDRiD_001.jpg", "IDRiD_002.jpg")
    pictures(tmp_path / "b", "IDRiD_001.jpg")
    head = "Image name,Retinopathy grade,Risk of macular edema {},,,,\n"
    training = table(tmp_path / "a.csv", head.format("") + "IDRiD_001,3,2,,,,\nIDRiD_002,0,0,,,,\n")
    testing = table(tmp_path / "b.csv", "Image name,Retinopathy grade,Risk of macular edema\nIDRiD_001,4,0\n")
    sides = {"test_labels": testing, "test_images": tmp_path / "b"}
    grades = LabeledSet(training, tmp_path / "a", "idrid", **sides).read(Skipped())
    assert (grades.names, grades.test.tolist()) == (("0", "3", "4"), [False, False, True])
    risks = LabeledSet(training, tmp_path / "a", "idrid-dme", **sides).read(Skipped())
    assert risks.names == ("0", "2")


def chest(folder: Path, count: int = 60) -> Path:
    """ChestX-ray14 as it is unpacked: images in a dozen folders."""
    head = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    lines, findings = [head], ["Cardiomegaly", "Effusion|Pleural_Thickening", "No Finding", "Mass|Effusion"]
    for i in range(count):
        pictures(folder / f"images_{i % 3:03}" / "images", f"{i:08}_000.png")
        lines.append(f"{i:08}_000.png,{findings[i % 4]},0,{i // 2},57,M,PA,2682,2749,0.143,0.143")
    (folder / "test_list.txt").write_text("\n".join(f"{i:08}_000.png" for i in range(20)))
    return table(folder / "Data_Entry_2017_v2020.csv", "\n".join(lines))


def test_chestxray14_lies_in_many_folders_and_has_a_list_of_test_images(tmp_path: Path) -> None:
    path = chest(tmp_path)
    found = LabeledSet(
        path, tmp_path, "chestxray14", test_list=tmp_path / "test_list.txt", only="effusion;mass"
    ).read(Skipped())
    assert len(found.images) == 60
    assert found.test.sum() == 20
    assert found.truth.sum(axis=0).tolist() == [30, 15]
    assert len(set(found.patients)) == 30


def test_midrc(tmp_path: Path) -> None:
    names = ["XR Chest PA and Lateral", "Portable XR Chest AP single view"]
    pictures(tmp_path, *(f"x/{i}.png" for i in range(8)))
    rows = [f"x/{i}.png,{names[i % 2]},case{i // 2}" for i in range(8)]
    path = table(tmp_path / "m.csv", "\n".join(["ImageID,loinc_long_common_name_0,case_id", *rows]))
    for name in ("midrc-xr", "midrc-xr-portable"):
        found = LabeledSet(path, tmp_path, name, patient_column="case_id", split_seed=0).read(Skipped())
        assert (len(found.images), found.names) == (8, tuple(sorted(n.casefold() for n in names)))
        assert len(set(found.patients)) == 4


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    spec = TowerSpec(
        width=32, depth=3, heads=4, mlp_width=64, patch_size=14, image_size=28, activation="gelu"
    )
    model = CLIPVisionModel(builders.tower_config())
    return save_tower(Tower.from_model(model, spec), tmp_path_factory.mktemp("t") / "tower")


def test_one_command_prints_the_published_rows_beside(
    tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    path = chest(tmp_path / "nih")
    given = ("--encoder", tower, "--labels", path, "--images", tmp_path / "nih", "--dataset", "chestxray14")
    only = ("--only", "effusion;mass", "--min-positives", 2)
    done = invoke(main, "probe", *given, *only, "--compare", "paper")
    assert done.code == 0, done.err
    for said in ("paper: MGLL", "82.94", "paper: FG-CLIP", "76.62"):
        assert said in done.out
    assert "no --patient-column" not in done.err
    assert "published results of a full fine-tune: " in refused(
        main, "probe", *given, "--dataset", "rfmid", "--protocol", "finetune", "--compare", "paper"
    )


def test_the_list_names_every_benchmark() -> None:
    done = invoke(main, "probe", "--list")
    assert done.code == 0, done.err
    assert all(name in done.out for name in benchmarks())


def test_published_figures_are_those_of_the_tables(real_data: Path) -> None:
    paper = real_data.parent / "paper"
    if not paper.is_dir():
        pytest.skip("no tables of the paper at hand")
    with (paper / "xray_auc_acc_map.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for name in ("MIDRC-XR", "MIDRC-XR-Portable", "ChestX-ray14"):
        for protocol, short in ((LINEAR, "LP"), (FINETUNE, "FT")):
            for row in rows:
                for metric, value in published_figures(name, protocol)[row["method"]].items():
                    assert value == float(row[f"{name} {short} {metric}"])
    with (paper / "headline_auc.csv").open() as stream:
        headlines = {row["benchmark"]: row for row in csv.DictReader(stream)}
    for name in ("ADAM", "REFUGE", "RFMiD"):
        assert published_figures(name)["MGLL"]["AUC"] == float(headlines[name]["MGLL"])
    assert {row.paper for row in benchmarks().values()} >= {
        "ADAM",
        "REFUGE",
        "RFMiD",
        "MIDRC-XR",
        "MIDRC-XR-Portable",
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--dataset", "palm", "--labels", "t.csv"],
            "no column 'imgName' (--image-column): did you mean 'imgname'?",
        ),
        (["--dataset", "adam", "--labels", "t.csv"], "is labeled by its folders: leave --labels out"),
        (["--dataset", "adam"], "has no file 'AMD/*.jpg'"),
        (["--dataset", "idrid"], "--labels is missing"),
        (["--labels", "t.csv", "--test-list", "none.txt"], "--test-list none.txt does not exist"),
        (["--labels", "t.csv", "--test-labels", "t.csv", "--split-column", "x"], "exclude each other"),
        (["--labels", "t.csv", "--image-column", "{imgnam}.png"], "no column 'imgnam'"),
        (["--labels", "t.xlsx"], "no column"),
    ],
)
def test_bad_input_is_one_line(
    tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "t.csv", "ID,imgname,Label\n1,V0001.jpg,0\n")
    table(tmp_path / "t.xlsx", "no workbook")
    assert complaint in refused(main, "probe", "--encoder", tower, "--images", tmp_path, *arguments)
