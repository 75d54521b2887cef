"""Attach, train, save, load and merge with every method; run by a fresh environment's Python, not by pytest."""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import tunerkit
import tunerkit_ia3
import tunerkit_lora
from tunerkit import PeftModel, get_peft_model

HEAVY = ("accelerate", "click", "huggingface_hub", "peft", "rich", "transformers")


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def live_through(config, folder):
    inputs, labels = torch.randn(8, 16), torch.randint(4, (8,))
    frozen = make_base()(inputs)
    model = get_peft_model(make_base(), config)
    torch.testing.assert_close(model(inputs), frozen)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    trained = model(inputs)
    assert (trained - frozen).abs().max() > 1e-3, "training changed nothing"
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(make_base(), folder)
    torch.testing.assert_close(loaded(inputs), trained)
    merged = loaded.merge_and_unload()
    assert [type(module) for module in merged] == [nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(merged(inputs), trained)


def loaded_heavies():
    return sorted(set(HEAVY) & {name.partition(".")[0] for name in sys.modules})


assert loaded_heavies() == [], f"importing loads {loaded_heavies()}"
configs = [
    tunerkit_lora.LoraConfig(r=4, target_modules=["0", "2"]),
    tunerkit_ia3.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
]
for config in configs:
    with tempfile.TemporaryDirectory() as folder:
        live_through(config, Path(folder) / "adapter")
assert loaded_heavies() == [], f"using loads {loaded_heavies()}"
sys.stdout.write("".join(f"{module.__file__}\n" for module in (tunerkit, tunerkit_ia3, tunerkit_lora)))
