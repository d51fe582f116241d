"""One folder per family, what they share, and their conversation formats."""

from collections.abc import Mapping
from importlib.resources import files

FAMILIES: Mapping[str, str] = {
    "llava": "mllm_adapters.families.llava:LLAVA",
    "llava-med": "mllm_adapters.families.llava:LLAVA_MED",
    "qwen-vl": "mllm_adapters.families.qwen_vl:QWEN_VL",
    "qwen2-vl": "mllm_adapters.families.qwen2_vl:QWEN2_VL",
    "internvl": "mllm_adapters.families.internvl:INTERNVL",
    "mini-gemini": "mllm_adapters.families.mini_gemini:MINI_GEMINI",
    "instructblip": "mllm_adapters.families.instructblip:INSTRUCTBLIP",
    "med-flamingo": "mllm_adapters.families.med_flamingo:MED_FLAMINGO",
    "janus-pro": "mllm_adapters.families.janus_pro:JANUS_PRO",
    "aya-vision": "mllm_adapters.families.aya_vision:AYA_VISION",
    "paligemma": "mllm_adapters.families.paligemma:PALIGEMMA",
}
"""Registry name -> ``module:object``; the module is imported on first use."""


def read_template(name: str) -> str:
    """A chat template of the folder ``templates``."""
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")
