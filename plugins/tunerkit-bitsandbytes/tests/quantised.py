"""Small models of quantised layers, which several test files use."""

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

FORMATS = ["nf4", "fp4", "int8"]
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
}
"""The sizes of a small model of transformers."""


def quantised(model, form="nf4", device="cpu", **settings):
    """Replace the linear layers of a model by quantised ones with their weights, in place, and return it."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and "head" not in name:  # transformers leaves the output layer as it is
                setattr(parent, name, quantised_linear(layer, form, **settings))
    # What transformers says of a model that it has quantised, and PEFT asks for.
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = form == "int8", form != "int8"
    return model.to(device)


def quantised_linear(layer, form, **settings):
    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if form == "int8":
        made = Linear8bitLt(*sizes, bias, has_fp16_weights=False, **settings)
    else:
        made = Linear4bit(*sizes, bias, quant_type=form, **{"compute_dtype": torch.float32, **settings})
        # Some processors reorder the numbers in a call without gradients, and round the scales; see test_sites.py.
        made.support_avx512bf16_for_cpu = False
    made.load_state_dict(layer.state_dict())
    return made


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        x = self.norm(x)
        x = x + self.second(torch.tanh(self.first(x)))
        return self.head(x)
