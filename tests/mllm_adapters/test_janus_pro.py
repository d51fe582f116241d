"""What is special about Janus-Pro: it also draws, and its understanding path is a LLaVA."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel, JanusConfig

import mllm_adapters.auto  # noqa: F401
from eval_mcq.items.schema import MCQItem
from eval_mcq.scoring.score import Scorer
from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import (
    BadDataError,
    InvalidArgumentError,
    UnsupportedCheckpointError,
    UserError,
)
from mllm_adapters import load_mllm
from mllm_adapters.api import plan_conversion, plan_swap
from mllm_adapters.cli.swap import main as swap_encoder
from mllm_adapters.core.fates import Kept, Reinitialized
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.core.stages import components
from mllm_adapters.data.chat_template import check_processor
from mllm_adapters.data.corpus import Corpus
from mllm_adapters.data.dataset import IGNORED, AnswerCollator, encode, prepare_examples
from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.families.janus_pro.modeling import MgllJanusConfig
from tests import builders
from tests.builders import sparse_checkpoint
from tests.mllm_adapters import janus_files as files
from tests.mllm_adapters.families.full_size import check_full_size, published_tower
from tests.mllm_adapters.retraining import turns

SIZES = files.Sizes()
PROMPTS = Path(__file__).parent / "prompts"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A tiny original Janus-Pro with a tokenizer."""
    folder = files.write(tmp_path_factory.mktemp("hosts") / "janus", SIZES)
    files.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tower of the host's width with another grid than its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("towers") / "mgll"
    CLIPVisionModel(builders.tower_config(hidden_size=SIZES.width)).save_pretrained(folder)
    return folder


def swap(host, encoder, out, **options):
    plan = plan_swap(host, encoder, activation="gelu", **options) if encoder else plan_conversion(host)
    return plan.plan, plan.write(out)


@pytest.fixture(scope="module")
def swapped(host, encoder, tmp_path_factory):
    return swap(host, encoder, tmp_path_factory.mktemp("swapped") / "own")


@pytest.fixture(scope="module")
def as_llava(host, encoder, tmp_path_factory):
    return swap(host, encoder, tmp_path_factory.mktemp("swapped") / "llava", layout="llava")


@pytest.fixture(scope="module")
def converted(host, tmp_path_factory):
    return swap(host, None, tmp_path_factory.mktemp("converted") / "janus")


def load(folder):
    return load_mllm(folder, dtype=torch.float32)


def draw(model, tokenizer):
    """Tokens, head scores and pixels of a drawn image."""
    begin = tokenizer.convert_tokens_to_ids("<begin_of_image>")
    model.generation_config.generation_kwargs = {"boi_token_id": begin}
    ids = tokenizer("a red circle<begin_of_image>", return_tensors="pt")
    drawn = model.generate(
        **ids, generation_mode="image", do_sample=False, guidance_scale=5, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return drawn.sequences, drawn.scores, model.decode_image_tokens(drawn.sequences)


# --- reading the original ---------------------------------------------------------------------------------------


def test_a_sharded_safetensors_checkpoint_reads_like_a_single_file(tmp_path):
    one, _ = load(files.write(tmp_path / "one", SIZES))
    many, _ = load(files.write(tmp_path / "many", SIZES, shards=3))
    assert all(torch.equal(many.state_dict()[name], value) for name, value in one.state_dict().items())


def test_sizes_that_no_config_has_are_read_off_the_weights(host):
    config = load(host)[0].config
    vision, vq = config.vision_config, config.vq_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (64, 3, 1)
    assert int(vision.hidden_size * vision.mlp_ratio) == SIZES.mlp
    assert (vq.base_channels, list(vq.channel_multiplier), vq.num_res_blocks) == (32, [1, 2], 1)
    assert (vq.latent_channels, vq.num_embeddings, vq.embed_dim, vq.num_patches) == (16, 24, 8, SIZES.grid)


@pytest.mark.parametrize("mlp", [97, 111, 176])
def test_an_mlp_whose_width_is_no_multiple_of_the_towers_is_read(tmp_path, mlp):
    model, _ = load(files.write(tmp_path / "janus", files.Sizes(mlp=mlp)))
    assert model.model.vision_model.encoder.layers[0].mlp.fc1.weight.shape == (mlp, SIZES.width)


def test_without_a_tokenizer_the_placeholder_is_a_new_row(tmp_path):
    checkpoint, family, _ = open_checkpoint(files.write(tmp_path / "janus", SIZES))
    plan = family.plan(checkpoint)
    assert plan.image_token_id == SIZES.vocab
    assert any(f"= {SIZES.vocab}, a new row: there is no tokenizer" in note for note in plan.notes)
    assert plan.config["text_config"]["vocab_size"] == 320


def test_conversion_gives_transformers_own_janus(host, converted):
    plan, folder = converted
    assert plan.config["model_type"] == "janus"
    in_memory, _ = load(host)
    for name, value in load(folder)[0].state_dict().items():
        assert torch.equal(value, in_memory.state_dict()[name]), name
    with pytest.raises(UnsupportedCheckpointError, match="already in the transformers layout"):
        swap(folder, None, folder / "again")


def test_a_converted_checkpoint_that_forgets_that_its_head_is_its_own_keeps_it(converted, encoder, tmp_path):
    _, folder = converted
    forgetful = tmp_path / "janus"
    forgetful.mkdir()
    for file in folder.iterdir():
        (forgetful / file.name).write_bytes(file.read_bytes())
    files.changed(forgetful, tie_word_embeddings=None)  # JanusConfig's default is true
    model, _ = load(forgetful)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    plan, _ = swap(forgetful, encoder, tmp_path / "swapped")
    assert plan.config["tie_word_embeddings"] is False


def test_a_converted_checkpoint_is_swapped_like_the_original(converted, swapped, encoder, tmp_path):
    plan, folder = swap(converted[1], encoder, tmp_path / "own")
    expected = load(swapped[1])[0].state_dict()
    for name, value in load(folder)[0].state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert plan.after == swapped[0].after
    assert plan.config["vq_config"].items() <= {"quantizer": 0, **swapped[0].config["vq_config"]}.items()


# --- drawing survives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [None, 28])
def test_the_swapped_model_draws_what_the_host_drew(host, encoder, tmp_path, image_size):
    model, processor = load(host)
    _, folder = swap(host, encoder, tmp_path / "own", image_size=image_size)
    other, _ = load(folder)
    before, after = draw(model, processor.tokenizer), draw(other, processor.tokenizer)
    for found, expected in zip(after, before, strict=True):
        assert torch.equal(found, expected)
    assert before[0].shape == (1, SIZES.grid**2)
    assert other.config.vision_config.num_image_tokens == SIZES.grid**2
    side = other.config.vision_config.image_size // 14
    assert side == (SIZES.grid if image_size is None else 2)


def test_transformers_own_configuration_would_take_the_towers_grid():
    """Negative control, and why there is a configuration of our own."""
    vision = {"image_size": 28, "patch_size": 14}
    assert JanusConfig(vision_config=vision, vq_config={"num_patches": 24}).vq_config.num_patches == 2
    own = MgllJanusConfig(vision_config=vision, vq_config={"num_patches": 24})
    assert own.vq_config.num_patches == 24
    assert MgllJanusConfig(**own.to_dict()).vq_config.num_patches == 24


def test_the_swapped_model_knows_how_an_image_begins(swapped):
    model, processor = load(swapped[1])
    ids = processor(text=["a red circle"], generation_mode="image", return_tensors="pt")
    tokens = model.generate(**ids, generation_mode="image", do_sample=False, guidance_scale=5)
    assert torch.equal(tokens, draw(model, processor.tokenizer)[0])


def test_drawn_pixels_become_a_picture_whatever_the_towers_pixels_are(swapped):
    _, processor = load(swapped[1])
    drawn = torch.tensor([-1.0, 0.0, 1.0]).repeat_interleave(4)[None, None, :, None].expand(1, 12, 12, 3)
    (picture,) = processor.post_process_multimodal_output(drawn, generation_mode="image")
    assert [picture.getpixel((x, 0)) for x in (0, 4, 8)] == [(0,) * 3, (127,) * 3, (255,) * 3]


# --- the understanding path as a LLaVA --------------------------------------------------------------------------


@torch.no_grad()
def test_the_llava_gives_the_logits_of_the_whole_model(swapped, as_llava):
    own, _ = load(swapped[1])
    llava, _ = load(as_llava[1])
    plan = as_llava[0]
    ids = torch.tensor([[1, 5] + [plan.image_token_id] * plan.after.tokens + [7, 9]])
    side = plan.after.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = own(input_ids=ids, pixel_values=pixels).logits
    found = llava(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_plan_says_what_the_llava_leaves_out(as_llava):
    plan = as_llava[0]
    gone = [t.name for t in plan.dropped if t.reason == "image generation is not part of a LLaVA"]
    assert {name.split(".")[0] for name in gone} == {
        "gen_vision_model",
        "gen_aligner",
        "gen_head",
        "gen_embed",
    }
    shapes = files.shapes(SIZES)
    size = sum(4 * torch.Size(shapes[name]).numel() for name in gone)
    assert f"image generation is left out: {len(gone)} tensors, {size / 1e6:.1f} MB" in plan.notes[-1]


def test_a_swapped_model_can_become_a_llava_later(swapped, as_llava, encoder, tmp_path):
    _, folder = swap(swapped[1], encoder, tmp_path / "llava", layout="llava")
    expected = load(as_llava[1])[0].state_dict()
    for name, value in load(folder)[0].state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("made", "kind"), [("converted", "Janus"), ("as_llava", "Llava")])
def test_what_is_stock_is_made_of_transformers_own_classes(made, kind, request):
    """The contract test loads the LLaVA in a process without this project."""
    model, processor = load(request.getfixturevalue(made)[1])
    assert type(model).__name__ == f"{kind}ForConditionalGeneration"
    assert type(processor).__name__ == f"{kind}Processor"
    classes = {type(m) for m in model.modules()} | {type(processor), type(processor.image_processor)}
    assert {cls.__module__.split(".")[0] for cls in classes} <= {"transformers", "torch"}


def test_the_command_writes_either_layout(host, encoder, tmp_path):
    arguments = ("--mllm", host, "--encoder", encoder, "--activation", "gelu", "--dry-run", "--json")
    for layout, model_type in (("own", "mgll_janus"), ("llava", "llava")):
        outcome = builders.invoke(swap_encoder, *arguments, "--layout", layout, "--out", tmp_path / "out")
        assert outcome.code == 0, outcome
        assert json.loads(outcome.out)["config"]["model_type"] == model_type


def test_a_deeper_aligner_is_no_llava(tmp_path, encoder):
    host = files.write(tmp_path / "janus", SIZES)
    state = load_file(host / "model.safetensors")
    for part in ("weight", "bias"):
        state[f"aligner.layers.4.{part}"] = state[f"aligner.layers.2.{part}"].clone()
    save_file(state, host / "model.safetensors")
    plan, folder = swap(host, encoder, tmp_path / "own")
    assert len(load(folder)[0].model.aligner.hidden_layers) == 2
    assert plan.config["aligner_depth"] == 3
    with pytest.raises(
        UnsupportedCheckpointError, match=r"aligner has 3 layers with gelu.*take `layout=own`"
    ):
        swap(host, encoder, tmp_path / "llava", layout="llava")


@pytest.mark.parametrize("made", ["converted", "swapped", "as_llava"])
def test_no_stage_trains_the_generator(made, request):
    model, _ = load(request.getfixturevalue(made)[1])
    found: dict[str, set[str]] = {}
    for name, component in components(model).items():
        found.setdefault(component, set()).add(re.sub(r"^model\.", "", name).split(".")[0])
    drawn = {"vqmodel", "generation_embeddings", "generation_aligner", "generation_head"}
    assert found.get("other", set()) == (set() if made == "as_llava" else drawn)
    assert found["projector"] == ({"multi_modal_projector"} if made == "as_llava" else {"aligner"})
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_a_wider_tower_means_a_new_connector(host, tmp_path):
    wide = tmp_path / "wide"
    CLIPVisionModel(builders.tower_config(hidden_size=48)).save_pretrained(wide)
    plan, _ = swap(host, wide, tmp_path / "own")
    assert plan.connectors["model.aligner.fc1"] == Reinitialized(before=64, after=48)
    plan, _ = swap(host, wide, tmp_path / "llava", layout="llava")
    assert plan.connectors["multi_modal_projector.linear_1"] == Reinitialized(before=64, after=48)


# --- processor and prompt ---------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is this glaucoma?"}]}]


@pytest.mark.parametrize("made", ["swapped", "as_llava", "converted"])
def test_the_prompt_of_a_question_about_an_image_is_frozen(made, request):
    _, folder = request.getfixturevalue(made)
    processor = AutoProcessor.from_pretrained(folder)
    found = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    name = "janus-pro-llava" if made == "as_llava" else "janus-pro"
    assert found == (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


@pytest.mark.parametrize("made", ["swapped", "as_llava", "converted"])
@torch.no_grad()
def test_processor_and_model_agree_on_the_tokens_of_an_image(made, request, tmp_path):
    plan, folder = request.getfixturevalue(made)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    picture = builders.picture(tmp_path, "a.png", size=53)
    from PIL import Image

    prompt = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    batch = processor(text=[prompt], images=[Image.open(picture)], return_tensors="pt")
    ids = batch["input_ids"][0].tolist()
    assert ids.count(plan.image_token_id) == plan.after.tokens == SIZES.grid**2
    first = ids.index(plan.image_token_id)
    around = [ids[first - 1], ids[first + plan.after.tokens]]
    tokens = ["<begin_of_image>", "<end_of_image>"]
    assert around == processor.tokenizer.convert_tokens_to_ids(tokens)
    assert ids[0] == processor.tokenizer.bos_token_id, (
        "the original's tokenizer puts its first token before a prompt"
    )
    assert ids[1] != processor.tokenizer.bos_token_id
    assert batch["pixel_values"].shape == (1, 3, plan.after.image_size, plan.after.image_size)
    assert torch.isfinite(model(**batch).logits).all()


def test_janus_own_pixels_are_padded_and_a_towers_are_its_own(host, converted, swapped):
    own, new = (AutoProcessor.from_pretrained(folder).image_processor for _, folder in (converted, swapped))
    assert type(own).__name__.startswith("JanusImageProcessor")
    assert list(own.image_mean) == [0.5, 0.5, 0.5]
    assert swapped[0].before.resize == "pad"
    assert list(new.image_mean) == [0.5, 0.5, 0.5], "the host's normalization; the difference is in the tower"
    assert swapped[0].after.resize == inspect_tower(swapped[0].tower, activation="gelu").spec.resize


@pytest.mark.parametrize("made", ["swapped", "as_llava"])
def test_it_can_be_trained_and_examined(made, request, tmp_path):
    _, folder = request.getfixturevalue(made)
    model, processor = load(folder)
    builders.picture(tmp_path, "a.png")
    row = {
        "id": "x",
        "image": "a.png",
        "conversations": turns("<image>\nWhat is it?", "A drusen.", "Sure?", "Yes."),
    }
    corpus = Corpus(tmp_path / "t.json", tmp_path, [Conversation.model_validate(row)], {"a.png": (40, 40)})
    examples, counts = prepare_examples(corpus, processor, 1000, text_only=False)
    encoded = encode(examples[0], tmp_path, processor)
    learnt = encoded["labels"][encoded["labels"] != IGNORED]
    assert processor.tokenizer.decode(learnt) == f" A drusen.{files.EOS} Yes.{files.EOS}"
    assert counts.kept == 1
    batch = AnswerCollator(processor.tokenizer.pad_token_id)([encoded])
    assert torch.isfinite(model(**batch).loss)
    whole = {k: v for k, v in batch.items() if k not in ("logits_to_keep", "shift_labels")}
    torch.testing.assert_close(model(**batch).loss, model(**whole).loss)

    from PIL import Image

    item = MCQItem(
        id="q", images=["a.png"], question="Which?", options=["red", "blue"], answer=0, category="C"
    )
    (score,) = Scorer(model, processor).score([item], [[Image.open(tmp_path / "a.png")]])
    assert sum(score.probabilities) == pytest.approx(1)


def test_a_processor_that_hides_the_system_prompt_from_the_template_is_refused_for_training(converted):
    """As in the published converted checkpoints: labels would stand where no answer is."""
    _, processor = load(converted[1])
    check_processor(processor)
    processor.use_default_system_prompt = True
    with pytest.raises(
        BadDataError, match=r"set use_default_system_prompt to false in processor_config\.json"
    ):
        check_processor(processor)


# --- full size --------------------------------------------------------------------------------------------------


def language(hidden, layers, inter):
    return 2 * 102400 * hidden + layers * (4 * hidden**2 + 3 * hidden * inter + 2 * hidden) + hidden


def block(width):
    """A pre-norm transformer block with biases and an MLP of four times the width."""
    return 12 * width**2 + 13 * width


SIGLIP = 576 * 1024 + 3 * 16**2 * 1024 + 1024 + 24 * block(1024) + 2 * 1024
CLIP = 1024 + 577 * 1024 + 3 * 14**2 * 1024 + 24 * block(1024) + 2 * 2 * 1024


def same(c):
    """A residual block that keeps its width c."""
    return 18 * c**2 + 6 * c


def attends(c):
    return 4 * c**2 + 6 * c


def resamples(c):
    return 9 * c**2 + c


def widens(a, b):
    """A residual block from width a to width b, with its shortcut."""
    return 10 * a * b + 9 * b**2 + 2 * a + 5 * b


# VQ-16: levels 128, 128, 256, 256, 512 wide, two blocks each in the encoder, three in the decoder, latent 256.
MIDDLE = 2 * same(512) + attends(512)
VQ_ENCODER = (
    (3 * 9 * 128 + 128) + 4 * same(128) + 2 * resamples(128) + widens(128, 256) + 3 * same(256) + 2 * resamples(256)
    + widens(256, 512) + same(512) + 2 * attends(512) + MIDDLE + 2 * 512 + (9 * 512 * 256 + 256)
)  # fmt: skip
VQ_DECODER = (
    (9 * 256 * 512 + 512) + MIDDLE + 3 * same(512) + 3 * attends(512) + resamples(512) + widens(512, 256)
    + 5 * same(256) + 2 * resamples(256) + widens(256, 128) + 5 * same(128) + resamples(128) + 2 * 128
    + (9 * 128 * 3 + 3)
)  # fmt: skip
VQ = VQ_ENCODER + VQ_DECODER + 16384 * 8 + (256 * 8 + 8) + (8 * 256 + 256)


def generation(hidden):
    """Embedding, aligner and head of the generator."""
    return 16384 * 8 + (8 * hidden + hidden) + 2 * (hidden**2 + hidden) + (hidden + 1) * 16384


def aligner(hidden):
    return 1024 * hidden + hidden + hidden**2 + hidden


@pytest.mark.parametrize("sizes", [files.PRO_7B, files.PRO_1B], ids=["7B", "1B"])
def test_the_published_checkpoint_is_planned_to_the_last_tensor(sizes, tmp_path):
    settings = files.config(sizes)
    if sizes is files.PRO_7B:  # as published: what is LLaMA's default is not said
        said = ("max_position_embeddings", "model_type", "num_hidden_layers", "torch_dtype", "vocab_size")
        settings["language_config"] = {k: settings["language_config"][k] for k in said}
    folder = sparse_checkpoint(tmp_path / "janus-pro", settings, files.shapes(sizes))
    files.write_pixels(folder, 384)
    tower = inspect_tower(published_tower(tmp_path / "mgll"), activation="gelu")
    checkpoint, family, _ = open_checkpoint(folder)
    text = language(sizes.hidden, sizes.layers, sizes.inter)
    drawing = VQ + generation(sizes.hidden)

    for image_size, side in ((224, 16), (336, 24), (None, 24)):
        plan = family.plan(checkpoint, tower, image_size)
        assert (plan.after.tokens, plan.after.image_size) == (side**2, side * 14)
        assert plan.config["vq_config"]["num_patches"] == 24
    assert (plan.before.tokens, plan.before.image_size) == (576, 384)
    assert (plan.image_token_id, plan.config["text_config"]["vocab_size"]) == (100581, 102400)
    assert set(plan.connectors.values()) == {Kept(width=1024)}
    check_full_size(plan, checkpoint, weights=text + CLIP + aligner(sizes.hidden) + drawing)

    converted = text + SIGLIP + aligner(sizes.hidden) + drawing
    assert round(converted / 1e9, 2) == {4096: 7.41, 2048: 2.08}[sizes.hidden]
    check_full_size(family.plan(checkpoint), checkpoint, weights=converted)
    if sizes is files.PRO_7B:
        llava = family.plan(checkpoint, tower, None, "llava")
        check_full_size(llava, checkpoint, weights=text + CLIP + aligner(sizes.hidden))
        assert llava.config["image_seq_length"] == 576


# --- what is refused --------------------------------------------------------------------------------------------


def detect(folder):
    return open_checkpoint(folder)


def test_deepseek_vl_shares_the_model_type_and_is_refused_by_name(tmp_path):
    host = files.changed(files.write(tmp_path / "vl", SIZES), gen_head_config=None, gen_vision_config=None)
    with pytest.raises(
        UnsupportedCheckpointError,
        match=r"config\.json .*no gen_head_config, so this is DeepSeek-VL.*Janus-Pro",
    ):
        detect(host)


def test_stock_deepseek_vl_and_janusflow_are_refused_by_name(tmp_path):
    host = files.changed(files.write(tmp_path / "other", SIZES), model_type="deepseek_vl")
    with pytest.raises(UnsupportedCheckpointError, match="DeepSeek-VL is another family: take Janus-Pro"):
        detect(host)
    flow = {"cls": "ShallowUViTEncoder", "params": {}}
    files.changed(host, model_type="multi_modality", gen_head_config=None, vision_gen_enc_config=flow)
    with pytest.raises(
        UnsupportedCheckpointError, match="this is JanusFlow, which generates images by rectified flow"
    ):
        detect(host)


def part(name, **params):
    """A part of config.json with other parameters."""
    made = files.config(SIZES)[name]
    return {name: {**made, "params": {**made["params"], **params}}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config says gptq.*use the unquantized"),
        ({"vision_config": None}, "vision_config is missing"),
        ({"aligner_config": {"cls": "MlpProjector"}}, "aligner_config: field 'params' is missing"),
        (part("vision_config", model_name="siglip_so400m_patch14_384"), "model_name is 'siglip_so400m"),
        (part("vision_config", pixel_mean=[0.5]), "pixel_mean is .*not supported"),
        (part("vision_config", image_size=64), "images are resized to 32 px, but config.json's tower takes 64"),
        (part("aligner_config", projector_type="linear"), "aligner_config.params: projector_type is 'linear'"),
        ({"language_config": {"model_type": "qwen2"}}, "language_config: model_type is 'qwen2'"),
        ({"language_config": {**files.config(SIZES)["language_config"], "hidden_size": 40}}, "mismatched"),
    ],
)  # fmt: skip
def test_another_variant_is_refused_in_one_line_that_names_the_field(tmp_path, fields, message):
    host = files.changed(files.write(tmp_path / "janus", SIZES), **fields)
    with pytest.raises(UserError, match=message) as refused:
        load(host)
    assert str(host) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vision_model.vision_tower.pos_embed", "pos_embed is missing: complete the download"),
        ("vision_model.vision_tower.blocks.1.attn.qkv.weight", "missing tensors"),
        ("aligner.layers.0.weight", r"aligner\.layers\.0\.weight is missing"),
        ("language_model.lm_head.weight", r"missing tensors, first lm_head\.weight"),
        ("gen_head.output_mlp_projector.weight", "output_mlp_projector.weight is missing"),
        ("gen_vision_model.decoder.conv_blocks.0.res.0.conv1.weight", "conv1.weight is missing"),
        ("language_model.model.embed_tokens.weight", "embed_tokens.weight is missing"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_by_its_tensor(tmp_path, name, message):
    host = files.write(tmp_path / "janus", SIZES)
    state = load_file(host / "model.safetensors")
    del state[name]
    save_file(state, host / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load(host)


def test_a_foreign_tensor_is_refused(tmp_path):
    host = files.write(tmp_path / "janus", SIZES)
    state = load_file(host / "model.safetensors")
    save_file({**state, "vision_model.high.sam.weight": torch.zeros(2)}, host / "model.safetensors")
    with pytest.raises(BadDataError, match=r"vision_model\.high\.sam\.weight is not part of a Janus-Pro"):
        load(host)


def test_a_head_that_changes_its_width_is_refused(tmp_path):
    host = files.write(tmp_path / "janus", SIZES)
    state = load_file(host / "model.safetensors")
    state["gen_head.output_mlp_projector.weight"] = torch.zeros(20, SIZES.hidden)
    save_file(state, host / "model.safetensors")
    with pytest.raises(UnsupportedCheckpointError, match="maps width 32 to 20"):
        load(host)


@pytest.mark.parametrize("token", ["<begin_of_image>", "<end_of_image>"])
def test_a_tokenizer_that_cannot_frame_an_image_is_refused(tmp_path, token):
    host = files.write(tmp_path / "janus", SIZES)
    files.write_tokenizer(host, left_out=token)
    with pytest.raises(BadDataError, match=f"the tokenizer has no {token}: it is not a Janus tokenizer"):
        load(host)


def test_a_tokenizer_without_the_placeholder_gets_it_as_the_original_code_does(tmp_path):
    host = files.write(tmp_path / "janus", SIZES)
    files.write_tokenizer(host, left_out="<image_placeholder>")
    model, processor = load(host)
    assert (
        processor.tokenizer.convert_tokens_to_ids("<image_placeholder>") == model.config.image_token_id == 263
    )


def test_a_llava_of_the_hosts_own_tower_is_refused(host):
    checkpoint, family, _ = open_checkpoint(host)
    with pytest.raises(InvalidArgumentError, match="the layout llava is for a checkpoint with a new tower"):
        family.plan(checkpoint, target="llava")
