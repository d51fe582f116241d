"""Round trips of questions to other tools: nothing is lost, guessed, or half-written."""

import base64
import csv
import io
import json

import pandas as pd
import pytest
import yaml
from PIL import Image

from eval_mcq.formats.conversations import parse_prompt, parse_reply
from eval_mcq.items import schema
from eval_mcq.items.schema import load_bench
from mgll_encoder.common.pseudonyms import is_pseudonym
from tests.builders import picture
from tests.eval_mcq.helpers import question, run_of_counts, save_run, small_bench, write_bench

ODD = [
    "tab\there", "line\nbreak", 'a "quoted" one', "naïve – 視網膜 \U0001f441", "comma, semicolon; pipe|", " spaces ",
    "U+2028\u2028",
]  # fmt: skip


def png(color=(10, 20, 30), size=(6, 5), mode="RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, "PNG")
    return stream.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_tsv(path, rows):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def tsv_row(index, image, **changes):
    return {
        "index": index, "image": image, "question": "What is seen?", "A": "drusen", "B": "cataract", "C": "nothing",
        "answer": "B", "category": "Cataract", **changes,
    }  # fmt: skip


@pytest.fixture
def odd_bench(tmp_path):
    """Questions full of tabs, quotes, line breaks and symbols; three share an image, one has two."""
    for i in range(3):
        picture(tmp_path / "pix", f"ä {i}.png", (i, 90, 20 * i))
    questions = [
        question(
            f"id {i}: {text}", f"pix/ä {i % 2}.png", question=f"{text}?", options=[text, f"not {text}", "A", "c"],
            answer=i % 4, patient=f"p{i}", source="s\t1", tags=["t", text],
        )
        for i, text in enumerate(ODD)
    ]  # fmt: skip
    questions[1]["images"] = ["pix/ä 2.png", "pix/ä 0.png"]
    return write_bench(tmp_path / "b.jsonl", questions, name="odd")


def without_patients(items):
    return [item.model_copy(update={"images": [], "patient": ""}) for item in items]


def image_bytes(bench):
    return [[path.read_bytes() for path in bench.image_paths(item)] for item in bench.items]


@pytest.mark.parametrize(("format_", "file"), [("vlmevalkit", "b.tsv"), ("parquet", "b.parquet")])
def test_a_round_trip_loses_nothing_and_images_stay_byte_for_byte(
    eval_mcq, odd_bench, tmp_path, format_, file
):
    first = load_bench(odd_bench)
    there, back = tmp_path / "sent" / file, tmp_path / "received" / "again.jsonl"
    assert eval_mcq("export", odd_bench, "--format", format_, "--out", there) == 0, eval_mcq.err
    assert eval_mcq("import", there, "--format", format_, "--out", back) == 0, eval_mcq.err
    again = load_bench(back)
    assert without_patients(again.items) == without_patients(first.items)
    assert all(is_pseudonym(item.patient) for item in again.items)
    assert len({item.patient for item in again.items}) == len({item.patient for item in first.items})
    assert image_bytes(again) == image_bytes(first)
    assert len(list((tmp_path / "received" / "again_images").iterdir())) == 3  # one file per picture
    third = tmp_path / "received" / file
    assert eval_mcq("export", back, "--format", format_, "--out", third) == 0
    assert eval_mcq("import", third, "--format", format_, "--out", back, "--force") == 0
    assert load_bench(back).items == again.items


def test_what_vlmevalkit_reads_of_the_table_is_what_was_meant(eval_mcq, odd_bench, tmp_path):
    assert eval_mcq("export", odd_bench, "--format", "vlmevalkit", "--out", tmp_path / "b.tsv") == 0
    data = pd.read_csv(tmp_path / "b.tsv", sep="\t")  # as vlmeval/smp/file.py loads it
    items = load_bench(odd_bench).items
    assert data["index"].tolist() == list(range(len(items)))
    assert [[row[c] for c in "ABCD"] for _, row in data.iterrows()] == [item.options for item in items]
    assert data["answer"].tolist() == [item.letter for item in items]
    assert data["image"][2] == "0"  # the same picture as in row 0
    assert base64.b64decode(data["image"][0]) == (tmp_path / "pix" / "ä 0.png").read_bytes()


def test_an_option_that_vlmevalkit_would_lose_is_not_exported(eval_mcq, tmp_path):
    picture(tmp_path, "a.png")
    bench = write_bench(tmp_path / "b.jsonl", [question("q", options=["x", "None"])])
    error = eval_mcq.refuses("export", bench, "--format", "vlmevalkit", "--out", tmp_path / "b.tsv")
    assert "question 'q': VLMEvalKit reads the option 'None' as missing" in error
    assert not (tmp_path / "b.tsv").exists()


def test_the_answers_of_a_run_become_its_prediction_table(eval_mcq, tmp_path):
    counts = {"DR": (2, 3), "AMD": (1, 1)}
    picture(tmp_path, "a.png")
    ids = [f"{disease}-{i}" for disease, (_, n) in counts.items() for i in range(n)]
    bench = write_bench(
        tmp_path / "b.jsonl",
        [question(i, category=i.split("-")[0], answer="A", options=["1\t", "2", "3", "4"]) for i in ids],
    )
    run = save_run(run_of_counts(counts, bench=load_bench(bench).digest), tmp_path / "run")
    out = tmp_path / "m_b.tsv"
    assert eval_mcq("export", bench, "--format", "vlmevalkit", "--run", run, "--out", out) == 0
    data = pd.read_csv(out, sep="\t")
    assert data["prediction"].tolist() == ["A", "A", "B", "A"]
    assert data["index"].tolist() == [0, 1, 2, 3]
    assert (data["prediction"] == data["answer"]).groupby(data["category"]).sum().to_dict() == {
        "DR": 2,
        "AMD": 1,
    }
    other = save_run(run_of_counts(counts), tmp_path / "other")
    assert "give the bench that was run" in eval_mcq.refuses(
        "export", bench, "--format", "vlmevalkit", "--run", other, "--out", tmp_path / "x.tsv"
    )


def test_a_task_folder_for_lmms_eval_needs_no_code(eval_mcq, tmp_path):
    import datasets

    bench = small_bench(tmp_path)
    assert eval_mcq("export", bench, "--format", "lmms-eval", "--out", tmp_path / "Fundus 10") == 0
    settings = yaml.safe_load((tmp_path / "Fundus 10" / "fundus_10.yaml").read_text())
    data = datasets.load_dataset(settings["dataset_path"], cache_dir=str(tmp_path / "cache"))
    rows = data[settings["test_split"]]
    items = load_bench(bench).items
    assert rows[settings["doc_to_target"]] == [item.letter for item in items]
    assert rows[0][settings["doc_to_visual"]].mode == "RGB"
    assert rows[0][settings["doc_to_text"]].startswith("What is seen?\nA. drusen\nB. a cataract\nAnswer with")
    assert sorted(p.name for p in (tmp_path / "Fundus 10").iterdir()) == ["data", "fundus_10.yaml"]


def test_images_that_refer_to_another_row_and_circular_copies(eval_mcq, tmp_path):
    first, second = png((1, 2, 3)), png((9, 9, 9))
    turned = {"A": "cataract", "B": "nothing", "C": "drusen", "answer": "A"}
    rows = [
        tsv_row(3, "7"),  # ahead of its picture
        tsv_row(7, b64(first), question="And here?"),
        tsv_row(1000003, "7", **turned),
        tsv_row(2000003, "7", A="nothing", B="drusen", C="cataract", answer="C"),
        tsv_row(1000099, b64(second)),  # no question 99: stands for itself
        tsv_row(1000007, "7", question="Something else?"),
    ]
    table = write_tsv(tmp_path / "circ.tsv", rows)
    assert eval_mcq("import", table, "--format", "vlmevalkit", "--out", tmp_path / "b.jsonl") == 0, (
        eval_mcq.err
    )
    bench = load_bench(tmp_path / "b.jsonl")
    assert [item.id for item in bench.items] == ["3", "7", "1000099", "1000007"]
    assert image_bytes(bench) == [[first], [first], [second], [first]]
    assert "2 circular copies" in eval_mcq.err
    rows[2]["answer"] = "C"
    error = eval_mcq.refuses(
        "import", write_tsv(table, rows), "--format", "vlmevalkit", "--out", tmp_path / "c.jsonl"
    )
    assert (
        "circular copy 1000003 of question '3' has the answer 'drusen', the question itself 'cataract'"
        in error
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.jsonl", "b_images", "circ.tsv"]


def test_gmai_counts_by_clinical_task_and_paths_are_taken_as_well(eval_mcq, tmp_path):
    picture(tmp_path / "pix", "a.png")
    row = tsv_row(
        0, "", image_path="a.png", hint="Look.", department="ophthalmology", **{"clinical vqa task": "DD"}
    )
    del row["image"]
    table = write_tsv(tmp_path / "g.tsv", [row])
    assert (
        eval_mcq(
            "import",
            table,
            "--format",
            "gmai",
            "--images",
            tmp_path / "pix",
            "--out",
            tmp_path / "o" / "b.jsonl",
        )
        == 0
    ), eval_mcq.err
    (item,) = load_bench(tmp_path / "o" / "b.jsonl").items
    assert item.category == "DD"
    assert item.tags == ["department=ophthalmology"]
    assert item.question == "Look.\nWhat is seen?"
    assert item.images == ["../pix/a.png"]


OMNI = {
    "dataset": "D", "question_id": "q1", "question_type": "Disease Diagnosis", "question": "Which?",
    "gt_answer": "Cataract", "image_path": "a.png", "option_A": "AMD", "option_B": "cataract",
    "modality_type": "Fundus",
}  # fmt: skip


def test_omnimedvqa_names_the_answer_by_its_text(eval_mcq, tmp_path):
    picture(tmp_path, "a.png")
    files = tmp_path / "qa"
    files.mkdir()
    (files / "1.json").write_text(json.dumps([OMNI]))
    (files / "2.json").write_text(
        json.dumps([{**OMNI, "question_id": "q2", "option_C": "DR", "gt_answer": "DR"}])
    )
    call = ("import", files, "--format", "omnimedvqa", "--images", tmp_path, "--out", tmp_path / "b.jsonl")
    assert eval_mcq(*call) == 0, eval_mcq.err
    items = load_bench(tmp_path / "b.jsonl").items
    assert [(item.id, item.letter, item.source, item.tags) for item in items] == [
        ("q1", "B", "D", ["modality_type=Fundus"]),
        ("q2", "C", "D", ["modality_type=Fundus"]),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gt_answer": "glaucoma"}, "answer 'glaucoma' is not among the options (A. AMD, B. cataract)"),
        ({"gt_answer": ""}, "the answer is blank"),
        ({"gt_answer": None, "gt_anwser": "x"}, "did you mean 'gt_anwser'?"),
        ({"option_B": "", "option_C": "cataract"}, "option 'option_B' is blank, but 'option_C' is not"),
        ({"option_A": "Cataract "}, "answer 'Cataract' matches several options"),
        ({"image_path": "b.png"}, "image"),
        ({"question": ""}, "field 'question'"),
    ],
)
def test_a_bad_entry_is_named_and_nothing_is_written(eval_mcq, tmp_path, change, said):
    picture(tmp_path, "a.png")
    entry = {
        key: value for key, value in {**OMNI, "question_id": "bad", **change}.items() if value is not None
    }
    (tmp_path / "qa.json").write_text(json.dumps([OMNI, entry]))
    error = eval_mcq.refuses(
        "import", tmp_path / "qa.json", "--format", "omnimedvqa", "--out", tmp_path / "b.jsonl"
    )
    assert said in error
    assert "entry 2" in error or "'bad'" in error
    assert not (tmp_path / "b.jsonl").exists()


def test_two_questions_with_one_id_are_refused(eval_mcq, tmp_path):
    picture(tmp_path, "a.png")
    (tmp_path / "qa.json").write_text(json.dumps([OMNI, OMNI]))
    error = eval_mcq.refuses(
        "import", tmp_path / "qa.json", "--format", "omnimedvqa", "--out", tmp_path / "b.jsonl"
    )
    assert "entry 2: id 'q1' is already used by" in error


def bomb() -> bytes:
    """A PNG of a few bytes that claims to have 20000 x 20000 pixels."""
    data = bytearray(png())
    data[16:24] = (20000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b64(bomb()), "embedded image is too large to open safely"),
        (b64(png()[:60] + b"0" * 60), "embedded image cannot be decoded"),
        (b64(b"no picture " * 9), "embedded image is not in a supported format"),
        ("!" * 80, "the image is not base64"),
        ("12", "no row with this index has an image"),
        ("", "the image is blank"),
    ],
)
def test_a_bad_picture_is_refused_by_the_name_of_its_question(eval_mcq, tmp_path, image, said):
    table = write_tsv(tmp_path / "t.tsv", [tsv_row(1, b64(png())), tsv_row(2, image)])
    error = eval_mcq.refuses("import", table, "--format", "vlmevalkit", "--out", tmp_path / "b.jsonl")
    assert said in error
    assert "row 3" in error
    assert [p.name for p in tmp_path.iterdir()] == ["t.tsv"]


def test_llava_conversations_come_back_as_the_questions_they_were(eval_mcq, tmp_path):
    bench = small_bench(tmp_path)
    assert eval_mcq("export", bench, "--format", "llava", "--out", tmp_path / "train.json") == 0
    data = json.loads((tmp_path / "train.json").read_text())
    chat = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "A fundus."}]
    (tmp_path / "train.json").write_text(
        json.dumps([*data, {"id": "open", "image": "0.png", "conversations": chat}])
    )
    assert (
        eval_mcq("import", tmp_path / "train.json", "--format", "llava", "--out", tmp_path / "c.jsonl") == 0
    )
    assert "left out 1 of 11 questions: 1 without options or image" in eval_mcq.err
    was, now = load_bench(bench).items, load_bench(tmp_path / "c.jsonl").items
    asked = [(i.id, i.images, i.question, [o.strip() for o in i.options], i.answer) for i in was]
    assert [(i.id, i.images, i.question, [o.strip() for o in i.options], i.answer) for i in now] == asked


def test_rows_for_other_trainers_have_a_tag_per_image_but_for_trl_none(eval_mcq, tmp_path):
    bench = small_bench(tmp_path)
    rows = {}
    for form in ("messages", "trl"):
        assert eval_mcq("export", bench, "--format", form, "--out", tmp_path / f"{form}.json") == 0
        rows[form] = json.loads((tmp_path / f"{form}.json").read_text())
    for tagged, plain, item in zip(rows["messages"], rows["trl"], load_bench(bench).items, strict=True):
        asked, answered = plain["messages"]
        assert tagged["messages"] == [{**asked, "content": "<image>\n" + asked["content"]}, answered]
        assert "<image>" not in asked["content"]
        assert item.question in asked["content"]
        assert (answered["content"], plain["images"]) == (item.letter, item.images)
        assert tagged["images"] == plain["images"]


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("<image>\nWhich?\nA. x\nB. y\nAnswer with the letter.", ("Which?", ["x", "y"])),
        ("Context: c\nWhich?\nOptions: (A) one (B) two words", ("Context: c\nWhich?", ["one", "two words"])),
        (
            "Vitamin\nA. is listed\nWhich?\nA) x\nB) y\nC) z",
            ("Vitamin\nA. is listed\nWhich?", ["x", "y", "z"]),
        ),
        ("What is this?", None),
    ],
)
def test_the_ways_in_which_prompts_offer_options(prompt, parsed):
    assert parse_prompt(prompt) == parsed


@pytest.mark.parametrize("reply", ["B", "(B)", "B. two", "The answer is B.", "The correct option is B: two"])
def test_the_ways_in_which_replies_name_a_letter(reply):
    assert parse_reply(reply).strip("(). ") == "B" or reply.endswith("B: two")


def test_scienceqa_problems(eval_mcq, tmp_path):
    picture(tmp_path / "test" / "5", "image.png")
    problem = {
        "question": "Q?", "choices": ["x", "y"], "answer": 1, "hint": "H", "image": "image.png", "split": "test",
        "subject": "natural science", "topic": "biology",
    }  # fmt: skip
    problems = {"5": problem, "6": {**problem, "image": None}, "7": {**problem, "split": "train"}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    call = ("import", tmp_path / "problems.json", "--format", "scienceqa", "--out", tmp_path / "b.jsonl")
    assert eval_mcq(*call, "--split", "test") == 0, eval_mcq.err
    (item,) = load_bench(tmp_path / "b.jsonl").items
    assert (item.id, item.letter, item.question, item.category) == ("5", "B", "H\nQ?", "biology")
    assert "does not exist" in eval_mcq.refuses(*call, "--force")  # problem 7's image


def test_a_data_set_with_columns_of_its_own(eval_mcq, tmp_path):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        {
            "frage": Value("string"),
            "bild": ImageFeature(),
            "wahl": List(Value("string")),
            "label": Value("int64"),
        }
    )
    data = [{"bytes": png((i, 0, 0)), "path": None} for i in range(3)]
    columns = {"frage": ["a?", "b?", "c?"], "bild": data, "wahl": [["x", "y"]] * 3, "label": [0, 1, 1]}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "d.parquet")
    Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "d"))
    names = ("--map", "question=frage", "--map", "image=bild", "--map", "options=wahl")
    for source, out in ((tmp_path / "d.parquet", "p.jsonl"), (tmp_path / "d", "f.jsonl")):
        assert eval_mcq("import", source, "--format", "hf", *names, "--out", tmp_path / out) == 0, (
            eval_mcq.err
        )
        bench = load_bench(tmp_path / out)
        assert [item.letter for item in bench.items] == ["A", "B", "B"]
        assert image_bytes(bench) == [[image["bytes"]] for image in data]
    error = eval_mcq.refuses(
        "import", tmp_path / "d", "--format", "hf", *names[2:], "--out", tmp_path / "x.jsonl"
    )
    assert "has no column 'question' for the question" in error
    assert "name one with --map question=COLUMN" in error
    assert "unknown field of --map 'optoins': did you mean 'options'?" in eval_mcq.refuses(
        "import", tmp_path / "d", "--format", "hf", "--map", "optoins=wahl", "--out", tmp_path / "x.jsonl"
    )


def test_a_parquet_bench_is_run_as_it_is_and_an_exported_one_is_unpacked_first(eval_mcq, tmp_path):
    bench = small_bench(tmp_path)
    plain = load_bench(bench)
    schema.write_bench(tmp_path / "b.parquet", plain.header, plain.items)
    assert load_bench(tmp_path / "b.parquet").items == plain.items
    assert load_bench(tmp_path / "b.parquet").categories == ["AMD", "Cataract"]
    assert eval_mcq("export", bench, "--format", "parquet", "--out", tmp_path / "far" / "b.parquet") == 0
    error = eval_mcq.refuses(
        "export", tmp_path / "far" / "b.parquet", "--format", "jsonl", "--out", tmp_path / "x"
    )
    assert "is only inside the file: unpack it with `eval-mcq import" in error
    assert "no header of eval-mcq" in eval_mcq.refuses("export", foreign(tmp_path), "--out", tmp_path / "x")


def foreign(folder):
    pd.DataFrame({"a": [1]}).to_parquet(folder / "foreign.parquet")
    return folder / "foreign.parquet"


def test_options_that_would_have_no_effect_are_refused(eval_mcq, tmp_path):
    bench = small_bench(tmp_path)
    for options, said in (
        (("export", bench, "--format", "parquet", "--images", tmp_path), "--images has no effect"),
        (("export", bench, "--format", "llava", "--run", tmp_path), "--run has no effect"),
        (("import", bench, "--format", "llava", "--map", "id=x"), "--map has no effect"),
        (("import", bench, "--format", "omnimedvqa", "--split", "x"), "--split has no effect"),
    ):
        assert said in eval_mcq.refuses(*options, "--out", tmp_path / "out")
    assert "--force" in eval_mcq.refuses("import", bench, "--format", "llava", "--out", bench)
