"""What tests of merging into files ask of the folder that was written."""

from __future__ import annotations

import torch
from safetensors.torch import load_file


def check_equal(kind, out, ids, peft, tolerance=1e-5):
    """The folder loads, without a word of complaint, as a model with the outputs of the live merged one."""
    loaded, info = kind.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        merged = peft.merge_and_unload()
        torch.testing.assert_close(
            loaded.eval()(input_ids=ids)[0], merged(input_ids=ids)[0], atol=tolerance, rtol=tolerance
        )
    return loaded


def tensors_of(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def move(peft, seed=2):
    generator = torch.Generator().manual_seed(seed)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
