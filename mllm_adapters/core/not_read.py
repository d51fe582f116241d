"""Unsupported published models, each with a reason and an alternative.

The table is checked before any family (`mllm_adapters.core.registry.detect`): another model with a family's
``model_type`` is identified here by its fields. A model in no row and of no family is refused as unknown.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class NotRead(NamedTuple):
    """A kind of checkpoint that is refused by name.

    Attributes:
        title: Common name, for the documentation.
        named: Pattern for the whole ``model_type`` or one of ``architectures`` (case is ignored).
        reason: Why it is not supported; begins with its name.
        take: An alternative.
        fields: Dotted fields of config.json that distinguish it from others of that name -> a pattern to
            search in the field's value, or None for a field that is missing or null. All of them must match.
    """

    title: str
    named: str
    reason: str
    take: str
    fields: Mapping[str, str | None] = {}

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json describes such a checkpoint."""
        called = any(re.fullmatch(self.named, name, re.IGNORECASE) for name in names_of(config))
        return called and all(_found(config, path, pattern) for path, pattern in self.fields.items())

    def explain(self, config: Mapping[str, Any]) -> str:
        """Return the deciding fields, the reason, and an alternative."""
        values = {path: _value(config, path) for path in self.fields}
        decisive = [f"{path} is {v!r:.60}: " for path, v in values.items() if isinstance(v, str | int | list)]
        return f"{''.join(decisive)}{self.reason}: {self.take}"


def names_of(config: Mapping[str, Any]) -> Iterator[str]:
    """Return ``model_type`` and ``architectures`` of a config.json, if they are text."""
    architectures = config.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    return (name for name in (config.get("model_type"), *listed) if isinstance(name, str))


def not_read(config: Mapping[str, Any]) -> NotRead | None:
    """Return the first row that matches a config.json, or None."""
    return next((row for row in NOT_READ if row.fits(config)), None)


def _value(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _found(config: Mapping[str, Any], path: str, pattern: str | None) -> bool:
    value = _value(config, path)
    return value is None if pattern is None else value is not None and bool(re.search(pattern, str(value)))


LLAVA_WORKS = (
    "liuhaotian/llava-v1.5-7b, llava-hf/llava-1.5-7b-hf or microsoft/llava-med-v1.5-mistral-7b would work"
)
"""Alternatives to models close to LLaVA."""

_VIEWS = "LLaVA-NeXT and LLaVA-OneVision cut an image into views (anyres), which is not supported"
_MEDICAL = "of medical models, microsoft/llava-med-v1.5-mistral-7b and med-flamingo/med-flamingo are read"
_QWEN_VL = "take Qwen/Qwen-VL or Qwen/Qwen-VL-Chat"
_QWEN2_VL = "take Qwen2-VL, Qwen2.5-VL or a dense Qwen3-VL"
_INTERNVL = "take a dense chat model, such as OpenGVLab/InternVL2_5-8B or OpenGVLab/InternVL3_5-8B"
_JANUS = "take Janus-Pro (deepseek-ai/Janus-Pro-1B or -7B)"
_INSTRUCTBLIP = "take an InstructBLIP such as Salesforce/instructblip-vicuna-7b"
_FLAMINGO = "take Med-Flamingo's model.pt or OpenFlamingo-9B's checkpoint.pt next to its LLaMA folder"
_MGM = "expected LLaMA with the vicuna_v1 prompt; take MGM-7B or MGM-13B, with or without -HD"
_TOWER = "pass a multimodal model; `plan_swap(encoder=TOWER)` puts a tower into one"
_PRESENT = r"."
"""A pattern that matches every value."""

NOT_READ: tuple[NotRead, ...] = (
    # Models that people in medicine try first
    NotRead(
        "Gemma 3, MedGemma", r"gemma_?3.*",
        "Gemma 3 and MedGemma are not supported, they pool SigLIP's patches to 256 tokens that attend to each other "
        "in both directions", _MEDICAL,
    ),
    NotRead(
        "CheXagent", r"chexagent.*",
        "CheXagent is not supported, its classes are Python files of its repository, which are never run, and "
        "transformers has none in their place", _MEDICAL,
    ),
    NotRead(
        "MAIRA-2", r"maira.*",
        "MAIRA-2 is not supported, its classes are Python files of its repository, which are never run", _MEDICAL,
    ),
    # Close to LLaVA
    NotRead(
        "VILA, NVILA", r"n?vila.*|Llava(Llama|Mistral|Qwen|Qwen2|Gemma|Mixtral)Model(Config)?",
        "VILA and NVILA are not supported, their projector joins blocks of SigLIP's patches, and language model, tower "
        "and projector are separate folders", LLAVA_WORKS,
    ),
    NotRead(
        "TinyLLaVA", r"tiny_?llava.*",
        "TinyLLaVA is not supported, it joins SigLIP to Phi, OpenELM and other small language models by its "
        "own "
        "connectors", LLAVA_WORKS,
    ),
    NotRead(
        "LISA", r"LISA.*",
        "LISA is not supported, it has a SAM in addition to its tower, which segments from the language "
        "model's <SEG> "
        "token", LLAVA_WORKS,
    ),
    NotRead(
        "LLaVA-NeXT, LLaVA-OneVision", r"llava_?next.*|llava_?onevision.*", _VIEWS, LLAVA_WORKS,
    ),
    NotRead(
        "LLaVA-1.6 and LLaVA-OneVision in the original layout", r"llava.*", _VIEWS, LLAVA_WORKS,
        {"image_aspect_ratio": r"anyres"},
    ),
    NotRead(
        "LLaVA on MPT", r"llava_?mpt.*",
        "LLaVA on an MPT language model is not supported, only on LLaMA/Vicuna, Mistral and "
        "Qwen2", LLAVA_WORKS,
    ),
    NotRead(
        "LLaVA on Mixtral, Gemma, Phi or Qwen3", r"llava_?(mixtral|gemma|phi|qwen_?moe|qwen3).*",
        "LLaVA on this language model is not supported, only on LLaMA/Vicuna, Mistral and Qwen2", LLAVA_WORKS,
    ),
    NotRead(
        "ViP-LLaVA", r"vip_?llava.*",
        "ViP-LLaVA reads several layers of its tower side by side, which is not supported", LLAVA_WORKS,
    ),
    NotRead("Video-LLaVA", r"video_?llava.*", "Video-LLaVA has two towers, which is not supported", LLAVA_WORKS),
    NotRead(
        "a LLaVA that names no tower", r"Llava(Llama|Mistral|Qwen2?)ForCausalLM",
        "config.json names no vision tower",
        "set mm_vision_tower to the one that it was trained with (LLaVA-Med v1.0: openai/clip-vit-large-patch14)",
        {"mm_vision_tower": None},
    ),
    NotRead(
        "MinerU 2", r"mineru.*",
        "MinerU is not supported, it cuts pages into views and reads them with SigLIP", LLAVA_WORKS,
    ),
    # Other multimodal models
    NotRead(
        "SmolVLM, IDEFICS 3", r"smolvlm.*|idefics3.*",
        "SmolVLM is not supported, it cuts an image into tiles with tokens for rows and columns, and shuffles SigLIP's "
        "patches", LLAVA_WORKS,
    ),
    NotRead(
        "MiniCPM-V", r"minicpm_?[vo].*",
        "MiniCPM-V is not supported, its resampler and its slices are Python files of its repository, which are never "
        "run", LLAVA_WORKS,
    ),
    NotRead(
        "Molmo", r"molmo.*",
        "Molmo is not supported, it pools overlapping crops by attention over two layers of its tower", LLAVA_WORKS,
    ),
    NotRead(
        "Phi-3-Vision, Phi-3.5-Vision, Phi-4-Multimodal", r"phi[34]_?(v|5_?v|mm|multimodal).*",
        "Phi-3.5-Vision is not supported, it joins crops of an image with learned separators between "
        "rows", LLAVA_WORKS,
    ),
    NotRead(
        "Llama 3.2 Vision", r"mllama.*",
        "Llama 3.2 Vision is not supported, its cross-attention reads several layers of a tower for tiles", LLAVA_WORKS,
    ),
    NotRead("Llama 4", r"llama4.*", "Llama 4 is not supported, its layers are mixtures of experts", LLAVA_WORKS),
    NotRead(
        "GLM-4V, GLM-4.1V, GLM-4.5V", r"glm_?4v.*|glm4_?[0-9]?v.*",
        "GLM-4V is not supported, its tower takes images of any size in pairs of frames, and a convolution joins its "
        "patches", _QWEN2_VL,
    ),
    NotRead(
        "glm-4v-9b, VisualGLM", r"chatglm.*",
        "GLM-4V on ChatGLM is not supported, its classes are Python files of its repository, which are never run",
        _QWEN2_VL,
    ),
    NotRead(
        "xGen-MM, BLIP-3", r"xgen_?mm.*",
        "xGen-MM (BLIP-3) is not supported, a perceiver reads the views of an image", _INSTRUCTBLIP,
    ),
    NotRead(
        "mPLUG-Owl2, Q-Align", r"mplug_?owl.*",
        "mPLUG-Owl2 and Q-Align are not supported, their language model has separate weights for image "
        "tokens",
        LLAVA_WORKS,
    ),
    NotRead(
        "Pixtral, Mistral 3", r"pixtral.*|mistral3.*",
        "Pixtral is not supported, its tower takes images of any size", LLAVA_WORKS,
    ),
    NotRead("Florence-2", r"florence.*", "Florence-2 is not supported, its tower is a DaViT, not a "
        "ViT", LLAVA_WORKS),
    NotRead("Logics-Thinking", r"logics.*", "Logics-Thinking is not supported, it has two towers", LLAVA_WORKS),
    # Parts of a multimodal model
    NotRead("a language model", r"qwen[23]|(Llama|Mistral|Qwen[23]|Gemma2?|Phi3?|Mixtral)ForCausalLM",
            "this is a language model, without vision tower and projector",
            "pass a multimodal model made from it; for LLaVA's projector-only and LoRA folders it is "
            "`parts['base']=PATH`"),
    NotRead("a tower or a text encoder", r"clip(_(vision|text)_model)?|siglip2?(_vision_model)?|dinov[23].*|vit",
            "this is a tower or a text encoder alone", _TOWER),
    # Relatives of the families
    NotRead("Qwen-Audio", r"qwen",
            "this is Qwen-Audio: it has an 'audio' section, expected 'visual' (a tower for images)",
            _QWEN_VL, {"audio": _PRESENT}),
    NotRead("Qwen, without images", r"qwen",
            "this is the text-only Qwen: it has no 'visual' section, so there is no tower to replace", _QWEN_VL,
            {"visual": None}),
    NotRead("Qwen2-Audio", r"qwen2_audio", "Qwen2-Audio takes audio, not images", _QWEN2_VL),
    NotRead("Qwen2.5-Omni", r"qwen2_5_omni", "Qwen2.5-Omni is not supported, its speech part would be lost", _QWEN2_VL),
    NotRead("Qwen2.5-Omni, thinker", r"qwen2_5_omni_thinker",
            "Qwen2.5-Omni is not supported, its audio tower would be lost", _QWEN2_VL),
    NotRead("Qwen3-Omni", r"qwen3_omni_moe", "Qwen3-Omni is not supported", _QWEN2_VL),
    NotRead("Qwen3-VL, mixture of experts", r"qwen3_vl_moe",
            "Qwen3-VL with a mixture of experts is not supported", _QWEN2_VL),
    NotRead("Qwen3.5", r"qwen3_5(_moe)?", "Qwen3.5 is not supported, it has another language "
        "model", _QWEN2_VL),
    NotRead("InternVL 3.5 MoE, transformers layout", r"internvl",
            "this InternVL's language model is a mixture of experts, which is not supported", _INTERNVL,
            {"text_config.model_type": r"moe|gpt_oss|deepseek|mixtral"}),
    NotRead("InternVL 3.5 MoE", r"internvl_chat",
            "this InternVL's language model is a mixture of experts, which is not supported", _INTERNVL,
            {"llm_config.architectures": r"(?i)moe|gpt_?oss|deepseek|mixtral"}),
    NotRead("InternOmni", r"intern.*", "this is InternOmni, an InternVL with audio input", "take a chat "
        "model, such as "
            "OpenGVLab/InternVL2_5-8B", {"audio_config": _PRESENT}),
    NotRead("InternViT", r"intern_vit_6b", "this is InternVL's vision tower alone", _INTERNVL),
    NotRead("InternVL for retrieval", r"internvl(?!_?chat).*",
            "this InternVL is not a chat model, it compares images with texts", _INTERNVL, {"text_config": None}),
    NotRead("MGM-34B", r"mgm.*|mini_?gemini.*", "the language model of this Mini-Gemini is Yi (MGM-34B)", _MGM,
            {"vocab_size": r"^64000$"}),
    NotRead("MGM-8B", r"mgm.*|mini_?gemini.*", "the language model of this Mini-Gemini is LLaMA 3 (MGM-8B)", _MGM,
            {"vocab_size": r"^128256$"}),
    NotRead("MGM-2B, MGM-8x7B", r"(mgm|mini_?gemini)_?(gemma|mixtral|mistral|phi|qwen).*",
            "the language model of this Mini-Gemini is not a LLaMA", _MGM),
    NotRead("JanusFlow", r"multi_modality",
            "this is JanusFlow, which generates images by rectified flow and has another vision path",
            _JANUS, {"gen_head_config": None, "vision_gen_enc_config": _PRESENT}),
    NotRead("DeepSeek-VL, under Janus' model_type", r"multi_modality",
            "there is no gen_head_config, so this is DeepSeek-VL, which shares Janus' model_type", _JANUS,
            {"gen_head_config": None}),
    NotRead("DeepSeek-VL", r"deepseek_vl(_hybrid|_v2)?", "DeepSeek-VL is another family", _JANUS),
    NotRead("BLIP-2", r"blip-2", "this is BLIP-2, whose Q-Former does not read the instruction", _INSTRUCTBLIP),
    NotRead("InstructBLIP-Video", r"instructblipvideo",
            "this is InstructBLIP-Video, which reads several frames at once", _INSTRUCTBLIP),
    NotRead("IDEFICS", r"idefics2?",
            "an IDEFICS has other cross-attention blocks than OpenFlamingo and is not supported",
            _FLAMINGO),
    NotRead("Otter", r"otter|flamingo", "Otter's re-packaged Flamingo is not supported", _FLAMINGO),
)  # fmt: skip
"""The first matching row is used."""
