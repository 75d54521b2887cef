"""Which modules LoRA adapts when the config names none, by the type of a transformers model."""

from __future__ import annotations

_MODEL_TYPES = {
    "q v": "t5 mt5",
    "q_proj v_proj": (
        "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm"
    ),
    "q v q_proj v_proj": "blip-2",
    "q_proj v_proj fc1 fc2": "phi",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "query value": "bert electra layoutlm roberta xlm-roberta",
    "query_proj value_proj": "deberta-v2",
    "query_key_value": "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox",
    "in_proj": "deberta",
    "c_attn": "gpt2 gpt_bigcode",
    "c_attn c_proj": "btlm",
    "Wqkv": "mpt",
    "qkv_proj": "codegen",
    "key value receptance output": "rwkv",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
}

DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **{model_type: targets.split() for targets, types in _MODEL_TYPES.items() for model_type in types.split()},
    # The same layers stand in the vision and the audio tower, which stay as they are: hence a regex.
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}
"""Target modules (entries of a list, or a regex) by `model.config.model_type`."""
