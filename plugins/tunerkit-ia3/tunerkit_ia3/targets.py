"""Which modules (IA)³ adapts when the config names none, by the type of a transformers model."""

from __future__ import annotations

# Outputs to rescale, then the feed-forward layers whose input is rescaled: the types of models.
_MODEL_TYPES = {
    ("k v", "wo"): "t5",
    ("k v wi_1", ""): "mt5",
    ("k_proj v_proj", "down_proj"): "llama mistral",
    ("k_proj v_proj", "w2"): "mixtral",
    ("q_proj v_proj", "down_proj"): "gemma gemma2 gemma3_text llama4 qwen2 qwen3",
    ("q_proj v_proj", "fc2"): "bart phi",
    ("q_proj v_proj", "fc_out"): "gptj",
    ("q_proj v_proj", "c_proj"): "gpt_neo",
    ("q_proj k_proj", "fc2"): "opt",
    ("key value", "output.dense"): "bert roberta",
    ("key_proj value_proj", "output.dense"): "deberta-v2",
    ("in_proj", "output.dense"): "deberta",
    ("query_key_value", "dense_4h_to_h"): "RefinedWeb RefinedWebModel falcon gpt_neox",
    ("query_key_value", "mlp.dense_4h_to_h"): "bloom",
    ("c_attn", "mlp.c_proj"): "gpt2 gpt_bigcode",
}

DEFAULT_TARGETS: dict[str, list[str]] = {
    model_type: [*outputs.split(), *inputs.split()]
    for (outputs, inputs), types in _MODEL_TYPES.items()
    for model_type in types.split()
}
"""Target modules by `model.config.model_type`, the feed-forward ones included."""

DEFAULT_FEEDFORWARD: dict[str, list[str]] = {
    model_type: inputs.split() for (_, inputs), types in _MODEL_TYPES.items() for model_type in types.split()
}
"""The feed-forward modules among `DEFAULT_TARGETS`, by `model.config.model_type`."""
