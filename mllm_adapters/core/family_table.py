"""The families, by name, without heavy imports. To add one, add a folder under ``families`` and a row here."""

from collections.abc import Mapping

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
