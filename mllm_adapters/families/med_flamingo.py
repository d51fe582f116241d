"""Med-Flamingo, and OpenFlamingo-9B of 2023, which it continues: ``model.pt`` on a LLaMA folder and a CLIP file.

Layout, vision contract and prompt after snap-stanford/med-flamingo b3c1e64 (scripts/demo.py, src/utils.py) and
mlfoundations/open_flamingo 655f693 and 0.0.2 (open_flamingo/src/factory.py, flamingo.py, train/train_utils.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.texts import read_json
from mgll_encoder.spec import TowerSpec, checked
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.configs import build_config, read_fields, text_config, tower_config, tower_geometry
from mllm_adapters.contract import FAMILY_KEY, Family, FamilySpec, Plan, Reading, Step, Target
from mllm_adapters.families import read_template
from mllm_adapters.families.flamingo_file import (
    BRIDGE,
    HEAD,
    LANGUAGE_MODEL,
    PERCEIVER,
    Geometry,
    measure,
    rewidened,
    sort_names,
)
from mllm_adapters.families.flamingo_parts import (
    LANGUAGE_PART,
    TOWER_PREFIX,
    LlamaFields,
    check_language_model,
    frozen_steps,
    host_tower,
    inner_tower,
    language_model,
)
from mllm_adapters.planning import (
    IMAGE_TOKEN,
    TOWER_PART,
    after_swap,
    contract_of,
    kept,
    replaced,
    swap_notes,
    tower_steps,
)
from mllm_adapters.processing import (
    check_placeholder,
    has_tokenizer,
    host_pixels,
    image_processor,
    load_tokenizer,
    own_processor,
    text_side,
)

MODEL_TYPE = "mgll_flamingo"

END_OF_CHUNK, PADDING = "<|endofchunk|>", "<PAD>"
ADDED_TOKENS = (END_OF_CHUNK, IMAGE_TOKEN, PADDING)
"""What the original adds to LLaMA's tokenizer, in this order; the last one only if that has no padding token."""


class NativeFields(BaseModel):
    """What counts in a config.json of our own layout."""

    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    image_token_id: int
    perceiver_latents: int
    perceiver_width: int | None = None
    media_mask: Literal["preceding", "legacy"]


@dataclass(frozen=True)
class MedFlamingo(Family):
    """Loose weight files in the original layout, and our own layout."""

    spec: FamilySpec
    chat_template: str

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """``original`` for weight files without a config.json, ``transformers`` for our own, or None."""
        if not config:
            return "original"
        return "transformers" if config.get("model_type") == MODEL_TYPE else None

    def plan(
        self,
        checkpoint: Checkpoint,
        tower: TowerHeader | None = None,
        image_size: int | None = None,
        target: Target = "own",  # noqa: ARG002 (cross-attention is no LLaVA)
    ) -> Plan:
        """Plan a swap (``tower`` given) or a conversion to our own layout; see `Family.plan`."""
        if self.layout(checkpoint.config) == "original":
            return self._plan_original(checkpoint, tower, image_size)
        return self._plan_native(checkpoint, tower, image_size)

    def processor(self, plan: Plan) -> Any | None:
        """The FlamingoProcessor of the planned checkpoint; None where the source has no tokenizer."""
        from mllm_adapters.modeling.flamingo import FlamingoProcessor

        if plan.layout == "transformers":
            text = text_side(plan.source)
            if text is None:
                return None
            tokenizer, template, _ = text
        else:
            tokenizer, template = load_tokenizer(plan.parts[LANGUAGE_PART]), self.chat_template
            if tokenizer is None:
                return None
            added = plan.config["text_config"]["vocab_size"] - plan.image_token_id + 1
            _add_tokens(tokenizer, ADDED_TOKENS[:added])
        check_placeholder(tokenizer, IMAGE_TOKEN, plan.image_token_id)
        return FlamingoProcessor(image_processor(plan.after), tokenizer, chat_template=template)

    def readings(self, plan: Plan) -> tuple[Reading, ...]:  # noqa: ARG002 (it is always the same)
        """The bridge; before there is one, the perceiver reads the features themselves."""
        return (Reading(BRIDGE),)

    def for_alignment(self, plan: Plan, checkpoint: Checkpoint) -> Plan:
        """See `Family.for_alignment`: the perceiver's layers read features and latents alike, so they are all kept.

        A linear layer of its own, the bridge, brings the new features to what the old ones were.
        """
        if any(step.name == f"{BRIDGE}.weight" for step in plan.steps):
            return plan
        steps = [
            kept(checkpoint.header(step.replaces), step.name) if step.replaces else step
            for step in plan.steps
        ]
        old, new = plan.before.width, plan.after.width
        dtype = next(step.dtype for step in steps if step.name.startswith(PERCEIVER))
        shapes = {"weight": (old, new), "bias": (old,)}
        added = [
            Step(name=f"{BRIDGE}.{kind}", dtype=dtype, shape=shape, operation="reinit")
            for kind, shape in shapes.items()
        ]
        inner = plan.config["perceiver_intermediate_size"] // new * old
        return plan.model_copy(
            update={
                "steps": (*steps, *added),
                "config": {**plan.config, "perceiver_width": old, "perceiver_intermediate_size": inner},
                "readers": {BRIDGE: f"added ({new} -> {old} wide)", PERCEIVER[:-1]: f"kept ({old} wide)"},
            }
        )

    def _plan_original(
        self, checkpoint: Checkpoint, tower: TowerHeader | None, image_size: int | None
    ) -> Plan:
        names = sort_names(checkpoint)
        language = language_model(checkpoint)
        config = read_json(language / "config.json")
        fields = read_fields(LlamaFields, config, f"{language}/config.json")
        vocabulary, where = fields.vocab_size, str(checkpoint.files[0])
        trained = {step.name: step for step in names.steps(checkpoint)}
        geometry = measure(trained, fields.num_hidden_layers, where)
        check_language_model(geometry, fields, language, where)
        text = _text_config(config, vocabulary, geometry.rows, language)
        steps = [
            *trained.values(),
            *frozen_steps(checkpoint, language, names, geometry, tied=text["tie_word_embeddings"]),
        ]

        host = host_tower(checkpoint, names, geometry, tower)
        latents = geometry.config["perceiver_latents"]
        before = contract_of(host.spec, -1, False).model_copy(update={"tokens": latents})
        after = after_swap(before, tower, image_size, tokens=lambda _: latents)
        dtype = checkpoint.tensors[names.found["model.perceiver.latents"][0]].dtype
        steps, readers = rewidened(steps, before, after, checkpoint.folder)
        new, dropped = tower or host.header, list(names.dropped)
        if new is None:
            own, unused = inner_tower(checkpoint, names)
            steps += own
            dropped += unused
        else:
            steps += tower_steps(new, TOWER_PREFIX, after, dtype)
            dropped += replaced(names.vision)
        has_text = has_tokenizer(language)
        return Plan(
            family=self.spec.name,
            layout="original",
            source=checkpoint.folder,
            tower=new.source if new else None,
            tower_weights=new.weights if new else None,
            swapped=tower is not None,
            parts={**checkpoint.parts, LANGUAGE_PART: language},
            steps=tuple(steps),
            dropped=tuple(dropped),
            config={
                "architectures": ["FlamingoForConditionalGeneration"],
                "model_type": MODEL_TYPE,
                FAMILY_KEY: self.spec.name,
                "dtype": _language_dtype(steps, language),
                "vision_config": tower_config(new.spec if new else host.spec, after),
                "text_config": text,
                "image_token_id": vocabulary + ADDED_TOKENS.index(IMAGE_TOKEN),
                "media_mask": "preceding",
                **_perceiver_fields(geometry, before.width, after.width),
                "tie_word_embeddings": text["tie_word_embeddings"],
            },
            before=before,
            after=after,
            image_token_id=vocabulary + ADDED_TOKENS.index(IMAGE_TOKEN),
            processor="FlamingoProcessor with the LLaMA folder's tokenizer" if has_text else None,
            readers=readers,
            notes=(*host.notes, *swap_notes(tower, after), *_notes(geometry, vocabulary, steps)),
        )

    def _plan_native(self, checkpoint: Checkpoint, tower: TowerHeader | None, image_size: int | None) -> Plan:
        config = checkpoint.config
        if tower is None:
            raise UserError(
                f"{checkpoint.folder} is in the layout of this project already: nothing to convert"
            )
        fields = read_fields(NativeFields, config, f"{checkpoint.folder}/config.json")
        spec, depth, notes = _native_tower(checkpoint)
        before = contract_of(spec, -1, False).model_copy(update={"tokens": fields.perceiver_latents})
        after = after_swap(before, tower, image_size, tokens=lambda _: fields.perceiver_latents)
        old = [h for h in checkpoint.tensors.values() if h.name.startswith(TOWER_PREFIX)]
        rest = [kept(h) for h in checkpoint.tensors.values() if not h.name.startswith(TOWER_PREFIX)]
        by_name = {step.name: step for step in rest}
        if not old:
            raise UserError(f"{checkpoint.folder} has no tensors under {TOWER_PREFIX}: complete the download")
        geometry = measure(by_name, depth, str(checkpoint.folder))
        steps, readers = rewidened(rest, before, after, checkpoint.folder)
        return Plan(
            family=self.spec.name,
            layout="transformers",
            source=checkpoint.folder,
            tower=tower.source,
            tower_weights=tower.weights,
            swapped=True,
            steps=(*steps, *tower_steps(tower, TOWER_PREFIX, after, old[0].dtype)),
            dropped=replaced(h.name for h in old),
            config={
                **config,
                FAMILY_KEY: self.spec.name,
                "vision_config": tower_config(tower.spec, after),
                **(
                    _perceiver_fields(geometry, before.width, after.width)
                    if fields.perceiver_width is None
                    else {}
                ),
            },
            before=before,
            after=after,
            image_token_id=fields.image_token_id,
            processor=own_processor(checkpoint.folder),
            readers=readers,
            notes=(*notes, *swap_notes(tower, after)),
        )


def _add_tokens(tokenizer: Any, added: tuple[str, ...]) -> None:
    """Give LLaMA's tokenizer the tokens that the original adds, and its padding on the left."""
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(added)}, replace_extra_special_tokens=False
    )
    if PADDING in added:
        tokenizer.pad_token = PADDING
    tokenizer.padding_side = "left"


def _text_config(config: Mapping[str, Any], vocabulary: int, rows: int, folder: Path) -> dict[str, Any]:
    text = text_config("llama", config, rows, f"{folder}/config.json")
    end = text["eos_token_id"]
    added = {ADDED_TOKENS[i]: vocabulary + i for i in range(rows - vocabulary)}
    ends = [*(end if isinstance(end, list) else [end]), added[END_OF_CHUNK]]
    return {
        **text,
        "eos_token_id": [i for i in ends if i is not None],
        "pad_token_id": added.get(PADDING, text["pad_token_id"]),
    }


def _language_dtype(steps: list[Step], folder: Path) -> str:
    found = next((step.dtype for step in steps if step.name == f"{LANGUAGE_MODEL}norm.weight"), None)
    if found is None:
        raise UserError(f"{folder}: tensor model.norm.weight is missing: complete the download")
    return found


def _perceiver_fields(geometry: Geometry, old: int, new: int) -> dict[str, int]:
    """Fields of `FlamingoConfig`; the perceiver's MLPs are as many times wider than the features as before."""
    inner = geometry.config["perceiver_intermediate_size"] // old * new
    return {**geometry.config, "perceiver_intermediate_size": inner}


def _notes(geometry: Geometry, vocabulary: int, steps: list[Step]) -> Iterator[str]:
    latents, added = geometry.config["perceiver_latents"], geometry.rows - vocabulary
    yield (
        f"a picture is {latents} latents, which the language model reads by cross-attention: the text holds one "
        f"{IMAGE_TOKEN} = {vocabulary + 1} per picture"
    )
    yield (
        "media_mask in config.json: 'preceding', text attends to the picture before it, as open_flamingo does today; "
        "'legacy' is the code that Med-Flamingo was trained with (open-flamingo 0.0.2: to the picture after it)"
    )
    if any(step.name == HEAD and step.operation == "extend_rows" for step in steps):
        yield (
            f"lm_head has no trained rows for {', '.join(ADDED_TOKENS[:added])}: the original leaves them random, here "
            f"each is the mean of the others; {IMAGE_TOKEN} and padding are never generated, and <|endofchunk|> is not "
            "likely before lm_head is trained: set max_new_tokens"
        )


def _native_tower(checkpoint: Checkpoint) -> tuple[TowerSpec, int, tuple[str, ...]]:
    """Geometry and preprocessing of the tower in our own layout, depth of the language model, and notes."""
    where = checkpoint.folder / "config.json"
    config = build_config(checkpoint.config, str(where))
    vision = config.vision_config
    pixels, notes = host_pixels(checkpoint.folder, vision.image_size)
    tower = checked(TowerSpec, {**tower_geometry(vision), **pixels.model_dump()}, where)
    return tower, config.text_config.num_hidden_layers, notes


MED_FLAMINGO = MedFlamingo(
    spec=FamilySpec(
        name="med-flamingo",
        title="Med-Flamingo",
        hub_id="med-flamingo/med-flamingo",
        reads=("model.pt beside a LLaMA-7B and a CLIP, also as OpenFlamingo >= 2.0 saves it",),
        tower=r"vision_tower\.",
        # The original trains these two and the embedding; the gated blocks read latents as wide as the features.
        projector=r"perceiver\.|cross_attention\.|bridge\.",
        language_model=r"language_model\.|lm_head\.",
        sees=r"vision_tower\.|bridge\.",
        not_llava="Med-Flamingo cannot be written as a LLaVA: its language model reads images by cross-attention",
        loose_weights=(r"(?:module\.)?(?:perceiver|lang_encoder)\.", r"(?:module\.)?vision_encoder\."),
        parts={
            LANGUAGE_PART: "folder of the LLaMA-7B that it was trained on",
            TOWER_PART: "OpenAI's CLIP ViT-L/14, as state dict or transformers folder",
        },
    ),
    chat_template=read_template("flamingo.jinja"),
)
