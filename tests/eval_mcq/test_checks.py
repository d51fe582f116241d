"""`eval-mcq check`, and shards and modes from the command line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from eval_mcq.records.run_record import load_run
from mllm_adapters.cli.swap import main as swap
from tests.builders import invoke
from tests.builders import tiny_llava as write_tiny_llava
from tests.eval_mcq.helpers import small_bench
from tests.mllm_adapters import complete


@pytest.fixture
def bench(tmp_path):
    return small_bench(tmp_path / "data")


def blind(folder):
    """A model whose projector outputs zeros, as after a broken swap."""
    write_tiny_llava(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.model.multi_modal_projector.parameters():
            weight.zero_()
    model.save_pretrained(folder)
    return folder


def test_a_model_that_does_not_see_is_caught_and_one_that_does_passes(eval_mcq, tiny_llava, bench, tmp_path):
    assert eval_mcq("check", "--model", tiny_llava, "--bench", bench, "--limit", 6) == 0
    for said in (
        "USER: <image>",
        "drusen",
        "real",
        "blank",
        "shuffled",
        "letter prior",
        "A 0.",
        "no mgll_swap.json",
    ):
        assert said in eval_mcq.out
    error = eval_mcq.refuses("check", "--model", blind(tmp_path / "blind"), "--bench", bench, "--limit", 6)
    assert "the answers do not depend on the image" in error


def test_what_was_seen_is_written_with_intervals(eval_mcq, tiny_llava, bench, tmp_path):
    out = tmp_path / "check.json"
    assert eval_mcq("check", "--model", tiny_llava, "--bench", bench, "--limit", 6, "--out", out) == 0
    seen = json.loads(out.read_text())
    assert seen["questions"] == 6
    assert set(seen["average"]) == {"real", "blank", "shuffled"}
    for average in seen["average"].values():
        assert average["interval"]["low"] <= average["value"] <= average["interval"]["high"]
    for kind, lost in seen["drop"].items():
        assert lost is None or lost["value"] == pytest.approx(
            seen["average"]["real"]["value"] - seen["average"][kind]["value"]
        )
    assert "exists" in eval_mcq.refuses("check", "--model", tiny_llava, "--bench", bench, "--out", out)
    assert "add --bench" in eval_mcq.refuses("check", "--model", tiny_llava, "--out", tmp_path / "other.json")


def test_images_are_exchanged_with_those_of_another_patient():
    """The fellow eye often has the same disease: with its image the answer stays right, as if it did not matter."""
    from eval_mcq.items.schema import MCQItem
    from eval_mcq.runs.image_sensitivity import _exchanged

    items = [
        MCQItem(
            id=f"{p}{eye}",
            images=[f"{p}{eye}"],
            question="?",
            options=["a", "b"],
            answer=0,
            category="c",
            patient=p,
        )
        for p in "xyz"
        for eye in "LR"
    ]
    pictures = [[item.id] for item in items]  # names in place of images
    for item, (given,) in zip(items, _exchanged(items, pictures), strict=True):
        assert given[0] != item.patient
    alone = items[:2]
    assert _exchanged(alone, pictures[:2]) == [["xR"], ["xL"]], (
        "where there is one patient only, another image"
    )


def edited(file, **after):
    """A provenance with a different tower geometry."""
    made = json.loads(file.read_text())
    made["plan"]["after"] |= after
    file.write_text(json.dumps(made))


def test_a_tower_that_is_not_that_of_its_provenance_is_caught(eval_mcq, tmp_path):
    host, encoder = write_tiny_llava(tmp_path / "host"), complete.encoder(tmp_path / "mgll")
    assert invoke(swap, "--mllm", host, "--encoder", encoder, "--out", tmp_path / "model").code == 0
    model = tmp_path / "model"
    assert eval_mcq("check", "--model", model) == 0
    assert "tower by provenance: mgll in host" in eval_mcq.out
    assert "tower equals provenance: yes" in eval_mcq.out
    assert "recomputed from mgll (the file recorded at the swap), bit for bit" in eval_mcq.out
    shutil.rmtree(encoder)
    assert eval_mcq("check", "--model", model) == 0
    assert "tensors by their hashes; mgll was not found" in eval_mcq.out

    record = (model / "mgll_swap.json").read_text()
    width = json.loads(record)["plan"]["after"]["width"]
    edited(model / "mgll_swap.json", width=width + 16, mean=[0.5, 0.5, 0.5])
    error = eval_mcq.refuses("check", "--model", model)
    assert "image size, patch size and width of the tower are" in error
    assert f", {width}), not " in error
    assert "normalized with mean" in error
    (model / "mgll_swap.json").write_text("{}")
    assert "mgll_swap.json: field 'format' is missing, expected 3" in eval_mcq.refuses(
        "check", "--model", model
    )

    (model / "mgll_swap.json").write_text(record)
    for file in model.glob("*.safetensors"):
        weights = load_file(file)
        if found := [name for name in weights if "vision_tower" in name and name.endswith("fc1.weight")]:
            weights[found[0]][0, 0] += 1e-3
            save_file(weights, file, metadata={"format": "pt"})
    error = eval_mcq.refuses("check", "--model", model)
    assert "tower equals provenance: NO" in eval_mcq.out
    assert "the tower differs from its provenance" in error
    assert "fc1.weight has been changed" in error


def test_shards_are_run_and_merged(eval_mcq, tiny_llava, bench, tmp_path):
    call = ("run", "--model", tiny_llava, "--bench", bench, "--rotations", 2, "--out")
    assert eval_mcq(*call, tmp_path / "whole") == 0
    for i in range(2):
        assert eval_mcq(*call, tmp_path / f"s{i}", "--shard", f"{i}/2") == 0
        assert "eval-mcq merge" in eval_mcq.out
    assert eval_mcq("merge", tmp_path / "s0", tmp_path / "s1", "--out", tmp_path / "merged") == 0
    assert (tmp_path / "merged" / "answers.jsonl").read_bytes() == (
        tmp_path / "whole" / "answers.jsonl"
    ).read_bytes()
    assert "a different shard" in eval_mcq.refuses(*call, tmp_path / "s0", "--shard", "1/2")
    assert "exists" in eval_mcq.refuses(
        "merge", tmp_path / "s0", tmp_path / "s1", "--out", tmp_path / "merged"
    )
    for wrong in ("2/2", "1", "a/b"):
        assert "does not have the form i/n" in eval_mcq.refuses(*call, tmp_path / "x", "--shard", wrong)


@pytest.mark.parametrize("mode", ["options", "options-mean", "generate"])
def test_other_modes_are_recorded_and_never_mixed(eval_mcq, tiny_llava, bench, tmp_path, mode):
    call = ("run", "--model", tiny_llava, "--bench", bench, "--out", tmp_path / "run")
    assert eval_mcq(*call, "--mode", mode) == 0
    run = load_run(tmp_path / "run")
    assert run.record.mode == mode
    assert run.complete
    first = run.rows[0]
    if mode == "generate":
        assert (first.reply is None, first.chosen, run.unparsed) == (False, None, 10)
        assert not any(answer.right for answer in run.answers), "what cannot be read is wrong, never guessed"
    else:
        assert len(first.log_likelihoods) == len(first.tokens) == len(first.probabilities)
        assert first.letter_mass is None
    assert "a different scoring mode" in eval_mcq.refuses(*call)
