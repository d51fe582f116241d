"""A user exports a result for llama.cpp and Ollama: what is in the files, and what is refused.

What llama.cpp computes from them is compared in tests/clients/test_llama_cpp.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mgll_encoder.common.chat import render_chat
from mgll_encoder.common.errors import (
    InvalidArgumentError,
    NotFoundError,
    OutputTakenError,
    UnsupportedCheckpointError,
)
from mllm_adapters import export_gguf, load_mllm, plan_gguf, plan_swap
from mllm_adapters.cli.swap import main as swap_encoder
from tests.builders import invoke, refused, tiny_llava
from tests.mllm_adapters import complete
from tests.small_llava import ROWS, small_llava

gguf = pytest.importorskip("gguf")

HEADS = {"attn_q": 4, "attn_k": 2}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llava(tmp_path_factory.mktemp("export") / "llava", "clip")


@pytest.fixture(scope="module")
def exported(llava: Path) -> Path:
    return export_gguf(llava, llava.parent / "out", precision="float32")


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


def field(file: Path, name: str) -> Any:
    return gguf.GGUFReader(file).fields[name].contents()


def half_a_head_apart(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the order of rotary pairs: row 2i and 2i + 1 of a head become rows i and i + half."""
    rows = values.reshape(heads, -1, 2, *values.shape[1:])
    return torch.cat([rows[:, :, 0], rows[:, :, 1]], dim=1).reshape(values.shape)


def differing(folder: Path, exported: Path) -> list[str]:
    """Tensors of the model that are not in the files bit for bit, by the names that transformers gives them."""
    model, _ = load_mllm(folder, dtype=torch.float32)
    stored = {**tensors_of(exported / "model.gguf"), **tensors_of(exported / "mmproj.gguf")}
    names = {
        "model.language_model.embed_tokens": "token_embd", "model.language_model.norm": "output_norm",
        "lm_head": "output", "model.multi_modal_projector.linear_1": "mm.0",
        "model.multi_modal_projector.linear_2": "mm.2",
        "model.vision_tower.vision_model.embeddings.patch_embedding": "v.patch_embd",
        "model.vision_tower.vision_model.embeddings.position_embedding": "v.position_embd",
        "model.vision_tower.vision_model.pre_layrnorm": "v.pre_ln",
    }  # fmt: skip
    blocks = {
        "model.language_model.layers.{}.": ("blk.{}.", {
            "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }),
        "model.vision_tower.vision_model.encoder.layers.{}.": ("v.blk.{}.", {
            "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out",
            "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
        }),
    }  # fmt: skip
    for ours, (theirs, inside) in blocks.items():
        for number in range(3):  # of four blocks of the tower, three come before the features
            names |= {ours.format(number) + a: theirs.format(number) + b for a, b in inside.items()}
    wrong = []
    for name, value in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        target = names.get(module) or names.get(module.replace("vision_tower.", "vision_tower.vision_model."))
        if name.endswith("class_embedding"):
            found = stored.pop("v.class_embd")
        elif target is None:
            assert "post_layernorm" in name or ".layers.3." in name or name.endswith("position_ids"), name
            continue
        else:
            found = stored.pop(f"{target}.{kind}")
        tensor = torch.from_numpy(found).reshape(value.shape)
        if heads := HEADS.get(target.rpartition(".")[2] if target and not target.startswith("v.") else ""):
            tensor = half_a_head_apart(tensor, heads)
        if not torch.equal(tensor, value):
            wrong.append(name)
    assert not stored, "the files hold tensors that the model does not have"
    return wrong


def test_every_tensor_is_in_the_files_bit_for_bit(llava: Path, exported: Path, tmp_path: Path) -> None:
    assert differing(llava, exported) == []
    other = tmp_path / "other"
    other.mkdir()
    for file in llava.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    state = load_file(other / "model.safetensors")
    name = next(name for name in state if name.endswith("layers.1.self_attn.k_proj.weight"))
    state[name][0, 0] += 1
    save_file(state, other / "model.safetensors", {"format": "pt"})
    assert len(differing(other, exported)) == 1


def test_half_precision_rounds_matrices_and_leaves_vectors(
    llava: Path, exported: Path, tmp_path: Path
) -> None:
    half = export_gguf(llava, tmp_path / "half")
    for name in ("model.gguf", "mmproj.gguf"):
        whole = tensors_of(exported / name)
        for tensor, values in tensors_of(half / name).items():
            precise = values.ndim == 1 or "position_embd" in tensor
            assert values.dtype == (np.float32 if precise else np.float16)
            assert np.array_equal(values, whole[tensor].astype(values.dtype))


def test_the_settings_are_those_of_the_model(exported: Path) -> None:
    model, vision = exported / "model.gguf", exported / "mmproj.gguf"
    assert field(model, "general.architecture") == "llama"
    assert field(model, "llama.attention.head_count_kv") == 2
    assert field(model, "llama.rope.freq_base") == 10000
    assert field(vision, "clip.projector_type") == "mlp"
    assert field(vision, "clip.use_gelu") is True
    assert field(vision, "clip.vision.block_count") == 3
    assert field(vision, "clip.vision.feature_layer") == [3]
    assert field(vision, "clip.vision.image_size") == 56


def test_quick_gelu_and_the_last_layer_are_told(tmp_path: Path) -> None:
    model = small_llava(tmp_path / "llava", "clip", activation="quick_gelu", layer=-1)
    vision = export_gguf(model, tmp_path / "out") / "mmproj.gguf"
    assert field(vision, "clip.use_gelu") is False
    assert field(vision, "clip.vision.block_count") == 4


def test_the_tokenizer_is_in_the_file(llava: Path, exported: Path) -> None:
    _, processor = load_mllm(llava)
    file = exported / "model.gguf"
    tokens = field(file, "tokenizer.ggml.tokens")
    vocabulary = processor.tokenizer.get_vocab()
    assert len(tokens) == ROWS
    assert all(tokens[number] == token for token, number in vocabulary.items())
    assert tokens[len(vocabulary) :] == [f"[PAD{number}]" for number in range(len(vocabulary), ROWS)]
    kinds = field(file, "tokenizer.ggml.token_type")
    assert [kinds[number] for number in (0, 3, 4, ROWS - 1)] == [3, 3, 1, 5]
    assert field(file, "tokenizer.ggml.pre") == "gpt-2"
    assert field(file, "tokenizer.ggml.bos_token_id") == 1
    assert field(file, "tokenizer.ggml.add_bos_token") is False


def test_a_sentencepiece_tokenizer_scores_merges_in_their_order(golden: Path, tmp_path: Path) -> None:
    host = complete.BUILDERS["internvl-llama"](tmp_path / "host", lambda: golden)
    plan_swap(host, complete.encoder(tmp_path / "encoder"), layout="llava").write(tmp_path / "swapped")
    file = export_gguf(tmp_path / "swapped", tmp_path / "out") / "model.gguf"
    backend = json.loads((tmp_path / "swapped" / "tokenizer.json").read_text())["model"]
    assert field(file, "tokenizer.ggml.model") == "llama"
    tokens, scores = field(file, "tokenizer.ggml.tokens"), field(file, "tokenizer.ggml.scores")
    of = dict(zip(tokens, scores, strict=True))
    merged = [of["".join(pair)] for pair in backend["merges"]]
    assert merged == sorted(merged, reverse=True)
    kinds = dict(zip(tokens, field(file, "tokenizer.ggml.token_type"), strict=True))
    assert (kinds["<0x0A>"], kinds["<unk>"], kinds["</s>"]) == (6, 2, 3)
    # this tokenizer puts a space before the prompt only: the template does, and llama.cpp must not
    assert field(file, "tokenizer.ggml.add_space_prefix") is False
    assert "{{- ' ' + " in field(file, "tokenizer.chat_template")


@pytest.mark.parametrize("marker", ["<__media__>", "<__media_x7Kq__>"])
def test_the_chat_template_puts_pictures_where_transformers_does(
    llava: Path, exported: Path, marker: str
) -> None:
    _, processor = load_mllm(llava)
    question = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": "A."}]
    expected = render_chat(processor, talk, add_generation_prompt=True).replace("<image>", marker)
    given = [{"role": "user", "content": marker + "Which?"}, {"role": "assistant", "content": "A."}]
    processor.chat_template = field(exported / "model.gguf", "tokenizer.chat_template")
    assert render_chat(processor, given, add_generation_prompt=True) == expected


def test_the_modelfile_writes_what_the_template_writes(exported: Path) -> None:
    lines = (exported / "Modelfile").read_text()
    assert 'TEMPLATE """{{ .System }}USER: {{ .Prompt }} ASSISTANT:{{ .Response }}</s>"""' in lines
    assert "begin each question with '\\n'" in (exported / "README.md").read_text()


def test_the_command_exports_and_says_what_llama_cpp_does_otherwise(llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = invoke(swap_encoder, "export", llava, "--gguf", out, "--dry-run")
    assert planned.code == 0
    assert "mmproj.gguf" in planned.out
    assert not out.exists()
    done = invoke(swap_encoder, "export", llava, "--gguf", out, "--precision", "float32")
    assert done.code == 0, done.err
    assert "class token" in done.err
    assert sorted(file.name for file in out.iterdir()) == [
        "Modelfile",
        "README.md",
        "mmproj.gguf",
        "model.gguf",
    ]
    assert "issue 25814" in (out / "README.md").read_text()
    assert "exists: choose another --gguf" in refused(swap_encoder, "export", llava, "--gguf", out)
    assert "unknown --precision 'int8'" in refused(
        swap_encoder, "export", llava, "--gguf", tmp_path / "new", "--precision", "int8"
    )


def test_a_tower_without_class_token_has_no_such_warning(tmp_path: Path) -> None:
    plan = plan_gguf(small_llava(tmp_path / "llava"))
    assert len(plan.notes) == 1
    assert "56x56" in plan.notes[0]


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another architecture": (
        lambda folder: complete.BUILDERS["aya-vision"](folder, lambda: Path()),
        "model_type is 'aya_vision': this export writes LLaVA-shaped models only",
    ),
    "DINOv2": (lambda folder: small_llava(folder, "dinov2"), "the tower is a DINOv2"),
    "Gemma": (
        lambda folder: small_llava(folder, language="gemma"),
        "model_type is 'gemma', expected one of llama",
    ),
    "rotary scaling": (
        lambda folder: small_llava(
            folder, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}
        ),
        "rope_type is 'yarn', expected default or dynamic or linear",
    ),
    "no merges": (tiny_llava, "llama.cpp cannot use this tokenizer: it has no merges"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_before_anything_is_written(
    case: str, tmp_path: Path
) -> None:
    build, reason = REFUSED[case]
    model = build(tmp_path / "model")
    with pytest.raises(UnsupportedCheckpointError, match=reason.replace("(", r"\(")):
        export_gguf(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_unknown_pre_tokenizer_is_refused(llava: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in llava.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedCheckpointError, match="no name for its pre-tokenizer"):
        export_gguf(other, tmp_path / "out")


def test_a_value_too_large_for_half_precision_leaves_nothing(llava: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in llava.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    state = load_file(other / "model.safetensors")
    next(value for name, value in state.items() if name.endswith("linear_2.weight"))[0, 0] = 1e6
    save_file(state, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidArgumentError, match="more than float16 can hold"):
        export_gguf(other, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["other"]
    assert differing(other, export_gguf(other, tmp_path / "out", precision="float32")) == []


def test_the_model_itself_is_not_overwritten(llava: Path) -> None:
    with pytest.raises(OutputTakenError):
        export_gguf(llava, llava, force=True)


CONVERTER = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1])
model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys")), loading
assert (folder / "chat_template.jinja").is_file()
ids = AutoTokenizer.from_pretrained(folder)("Which?").input_ids
out.write_text(f"{type(model).__name__} {ids} {sys.argv[sys.argv.index('--outtype') + 1]}")
"""


def test_the_converter_gets_the_language_model_as_a_folder_of_transformers(
    llava: Path, tmp_path: Path
) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER)
    out = export_gguf(llava, tmp_path / "out", converter=script, precision="float32")
    _, processor = load_mllm(llava)
    ids = processor.tokenizer("Which?").input_ids
    assert (out / "model.gguf").read_text() == f"LlamaForCausalLM {ids} f32"
    assert sorted(file.name for file in out.iterdir()) == [
        "Modelfile",
        "README.md",
        "mmproj.gguf",
        "model.gguf",
    ]


def test_a_converter_that_fails_is_told_and_leaves_nothing(llava: Path, tmp_path: Path) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("raise SystemExit('unknown pre-tokenizer')")
    with pytest.raises(UnsupportedCheckpointError, match="ended with code 1 and said: unknown pre-tokenizer"):
        export_gguf(llava, tmp_path / "out", converter=script)
    assert not (tmp_path / "out").exists()
    with pytest.raises(NotFoundError):
        export_gguf(llava, tmp_path / "out", converter=tmp_path / "missing.py")
