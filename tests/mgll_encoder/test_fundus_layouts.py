"""A user has the label file of a published data set in its published form."""

from collections import Counter
from pathlib import Path

import pytest

from mgll_encoder.cli import main
from mgll_encoder.common.pseudonyms import is_pseudonym
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.tables import read_table
from mgll_encoder.data.fundus import FundusTable, build_fundus
from mgll_encoder.data.fundus_layouts import KEYWORDS, as_generic, layouts
from mgll_encoder.data.manifest import read_rows
from tests.builders import invoke, picture, refused


def test_rfmid_is_read_as_published(real_data: Path) -> None:
    path = real_data / "labels" / "RFMiD_Training_Labels.csv"
    table = read_table(path, "--labels")
    columns, records = table.columns, table.rows
    rows = as_generic("rfmid", table, Skipped(strict=True))
    assert len(rows) == 1920
    count = Counter(label for row in rows for label in row.labels)
    assert count["normal"] == sum(record["Disease_Risk"] == "0" for _, record in records)
    assert count["diabetic retinopathy"] == sum(record["DR"] == "1" for _, record in records)
    assert set(layouts()["rfmid"].binary) == set(columns) - {"ID", "Disease_Risk"}
    assert rows[0].image == "1.png"


def test_odirs_keywords_give_the_labels_of_one_eye(real_data: Path) -> None:
    """Compared with labels that were derived independently from the same keywords."""
    path = real_data / "labels" / "ODIR-5K_full_df.csv"
    skipped = Skipped()
    rows = {row.image: row for row in as_generic("odir", read_table(path, "--labels", skipped), skipped)}
    assert rows["0_left.jpg"].labels == {"cataract"}
    assert rows["0_right.jpg"].labels == {"normal"}
    assert len(rows) + skipped.total == skipped.read, "each eye once"
    compared = differing = 0
    for _, record in read_table(real_data / "fundus" / "manifest.csv", "--labels").rows:
        name = Path(record["file"]).name.removeprefix("odir_")
        if record["dataset"] == "ODIR-5K" and name in rows:
            compared += 1
            differing += set(record["labels"].split(";")) != rows[name].labels
    assert compared > 1900
    assert differing == 0
    assert len({row.patient for row in rows.values()}) == 3355, "of 3358; three have suspicions only"
    assert not any(
        all("suspect" in phrase for phrase in row.cells[KEYWORDS].split("，")) for row in rows.values()
    ), "a suspicion is no label"


def test_a_file_with_one_class_gets_its_names(tmp_path: Path) -> None:
    for name in ("V1.jpg", "V2.jpg", "V3.jpg"):
        picture(tmp_path, name)
    labels = tmp_path / "labels.csv"
    labels.write_text("imgName,Label,patient\nV1.jpg,0,a\nV2.jpg,1,b\nV3.jpg,,c\n")
    out = tmp_path / "m.jsonl"
    done = invoke(
        main, "data", "fundus", "--labels", labels, "--images", tmp_path, "--out", out, "--image-column", "imgName",
        "--labels-column", "Label", "--patient-column", "patient", "--classes", "0=normal,1=glaucoma",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = {row.image: row.texts["disease"] for _, _, row in read_rows(out)}
    assert found == {"V1.jpg": ["normal"], "V2.jpg": ["glaucoma"]}
    assert "no label" in done.err


def test_a_published_layout_becomes_a_manifest(tmp_path: Path) -> None:
    for name in ("0_left.jpg", "0_right.jpg"):
        picture(tmp_path, name)
    labels = tmp_path / "full_df.csv"
    row = '0,0_left.jpg,0_right.jpg,"cataract，lens dust",normal fundus\n'
    labels.write_text(
        "ID,Left-Fundus,Right-Fundus,Left-Diagnostic Keywords,Right-Diagnostic Keywords\n" + row + row
    )
    report = build_fundus(FundusTable(labels, dataset="odir"), tmp_path, tmp_path / "m.jsonl", test_share=0)
    found = {row.image: row for _, _, row in read_rows(tmp_path / "m.jsonl")}
    assert report.rows == 2
    assert found["0_left.jpg"].texts["keyword"] == ["cataract"]
    (patient,) = {row.patient for row in found.values()}
    assert is_pseudonym(patient)
    assert {row.source for row in found.values()} == {"ODIR-5K"}


def test_sets_with_one_class_are_read_as_published_from_tables_and_folders(tmp_path: Path) -> None:
    for name in ("AMD/A0001.jpg", "Non-AMD/N0001.jpg"):
        picture((tmp_path / "adam" / name).parent, Path(name).name)
    for name in ("P0001.jpg", "H0001.jpg", "N0001.jpg"):
        picture(tmp_path / "palm", name)
    refuge = tmp_path / "refuge.csv"
    refuge.write_text("ID,ImgName,Label(Glaucoma=1),Fovea_X,Fovea_Y\n1,T1.jpg,0,1,1\n2,T2.jpg,1,1,1\n")
    for name in ("T1.jpg", "T2.jpg"):
        picture(tmp_path / "test400", name)
    given = {
        "adam": ("--images", tmp_path / "adam"),
        "palm": ("--images", tmp_path / "palm"),
        "refuge": ("--images", tmp_path / "test400", "--labels", refuge),
    }
    found = {}
    for layout, options in given.items():
        out = tmp_path / f"{layout}.jsonl"
        done = invoke(main, "data", "fundus", "--dataset", layout, *options, "--out", out)
        assert done.code == 0, done.err
        assert ": 1 no label\n" in done.err
        found[layout] = {
            row.image: (row.texts["status"], row.texts["disease"]) for _, _, row in read_rows(out)
        }
    sick = ["abnormal fundus"]
    assert found == {
        "adam": {"AMD/A0001.jpg": (sick, ["age-related macular degeneration"])},
        "palm": {"P0001.jpg": (sick, ["myopia"]), "N0001.jpg": (["normal fundus"], ["normal"])},
        "refuge": {"T2.jpg": (sick, ["glaucoma"])},
    }


def test_a_set_labelled_by_folders_needs_them(tmp_path: Path) -> None:
    command = (main, "data", "fundus", "--images", tmp_path, "--out", tmp_path / "m.jsonl")
    assert "has no file 'AMD/*.jpg'" in refused(*command, "--dataset", "adam")
    assert "--labels is missing" in refused(*command)
    assert "needs its label file" in refused(*command, "--dataset", "rfmid")
    (tmp_path / "l.csv").write_text("imgName,Label\n1.jpg,2\n")
    assert "row 2: column 'Label' is '2': expected 0 or 1" in refused(
        *command, "--dataset", "palm", "--labels", tmp_path / "l.csv"
    )
    assert "leave --labels out" in refused(*command, "--dataset", "adam", "--labels", tmp_path / "l.csv")


@pytest.mark.parametrize(
    ("text", "arguments", "complaint"),
    [
        ("ID,DR\n1,0\n", ["--dataset", "rfmid"], "has no column 'AH' (data set 'rfmid')"),
        ("ID\n1\n", ["--dataset", "rfmd"], "did you mean 'rfmid'"),
        (
            "file,labels,patient_or_source_id\na.png,2,p\n",
            ["--classes", "0=normal"],
            "row 2: column 'labels' is '2'",
        ),
        ("file\n", ["--classes", "normal"], "expected VALUE=LABEL pairs"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, text: str, arguments: list[str], complaint: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    given = [
        "--labels",
        tmp_path / "labels.csv",
        "--images",
        tmp_path,
        "--out",
        tmp_path / "m.jsonl",
        *arguments,
    ]
    assert complaint in refused(main, "data", "fundus", *given)
    assert not (tmp_path / "m.jsonl").exists()
