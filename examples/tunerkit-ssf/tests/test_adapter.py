"""What is particular to the method: its formula, and the bias that it makes."""

import pytest
import torch
from torch import nn

from tunerkit import get_peft_model
from tunerkit_ssf import SSFConfig


@pytest.mark.parametrize("bias", [True, False])
def test_formula(bias):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5, bias=bias)), SSFConfig(target_modules=["0"]))
    layer, x = model.get_base_model()[0], torch.randn(3, 6)
    adapter = layer.adapters["default"]
    with torch.no_grad():
        adapter.ssf_scale.normal_()
        adapter.ssf_shift.normal_()
    expected = adapter.ssf_scale * layer.base_layer(x) + adapter.ssf_shift
    torch.testing.assert_close(model(x), expected)
    merged = model.merge_and_unload()[0]
    assert merged.bias is not None
    torch.testing.assert_close(merged(x), expected)
