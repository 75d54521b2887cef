"""The floor: LoRA as a careful person writes it by hand for one script, with two bare parameters and no framework.

It does what the measured jobs do and nothing else: it checks nothing, undoes nothing, and knows linear layers only.
The verbs are those of a `PeftModel`, so that one description of a job runs on every side.
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from suite.models import ALPHA, RANK, SCALING, numbers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PREFIX = "base_model.model."


class HandLayer(nn.Module):
    """A linear layer and one active pair of factors; other pairs wait beside it."""

    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]]

    def __init__(self, base: nn.Linear, name: str, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias, self.a, self.b = base.weight, base.bias, a, b
        self.pairs = {name: (a, b)}

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + bias + s x A^T B^T`, rows x out."""
        y = F.linear(x, self.weight, self.bias)
        return torch.addmm(y, F.linear(x, self.a), self.b.t(), alpha=SCALING)


def new_pair(base: nn.Linear | HandLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the two factors as LoRA starts them: `A` at random, `B` zero."""
    rows, columns = base.weight.shape
    a = torch.empty(RANK, columns)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return nn.Parameter(a), nn.Parameter(torch.zeros(rows, RANK))


def read(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint."""
    json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return load_file(folder / "adapter_model.safetensors")


def saved_pair(tensors: dict[str, Tensor], path: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the two factors of a layer from a checkpoint's tensors, frozen."""
    a, b = (tensors[f"{PREFIX}{path}.lora_{factor}.weight"] for factor in "AB")
    return nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)


class HandModel:
    """A model whose linear layers are all adapted.

    Args:
        model: The base model; its linear layers are replaced in place.
        name: The first adapter's name.
        folder: The checkpoint that it comes from, if it is not new.
    """

    def __init__(self, model: nn.Module, name: str, folder: Path | None = None) -> None:
        self.model = model
        self.layers: dict[str, HandLayer] = {}
        self.places: list[tuple[nn.Module, str, nn.Linear]] = []
        self.kept: list[Tensor] = []
        saved = None if folder is None else read(folder)
        for parameter in model.parameters():
            parameter.requires_grad = False
        for path, module in list(model.named_modules()):
            for child, base in list(module._modules.items()):
                if isinstance(base, nn.Linear):
                    key = f"{path}.{child}" if path else child
                    pair = new_pair(base) if saved is None else saved_pair(saved, key)
                    layer = HandLayer(base, name, *pair)
                    setattr(module, child, layer)
                    self.places.append((module, child, base))
                    self.layers[key] = layer

    def get_base_model(self) -> nn.Module:
        """Return the model with the adapted layers."""
        return self.model

    def eval(self) -> None:
        """Set evaluation mode."""
        self.model.eval()

    def __call__(self, x: Tensor) -> Tensor:
        """Run the model."""
        return self.model(x)  # type: ignore[no-any-return]

    def fill(self, name: str) -> None:
        """Put the numbers by which outputs are compared into an adapter."""
        with torch.no_grad():
            for path, layer in self.layers.items():
                for factor, tensor in zip("AB", layer.pairs[name], strict=True):
                    tensor.copy_(numbers(path, factor, name, tensor))

    def add_adapter(self, name: str) -> None:
        """Add an adapter beside the active one."""
        for layer in self.layers.values():
            pair = new_pair(layer)
            for tensor in pair:
                tensor.requires_grad = False
            layer.pairs[name] = pair

    def delete_adapter(self, name: str) -> None:
        """Take an adapter out that is not active."""
        for layer in self.layers.values():
            del layer.pairs[name]

    def load_adapter(self, folder: Path, name: str) -> None:
        """Add an adapter from a checkpoint."""
        tensors = read(folder)
        for path, layer in self.layers.items():
            layer.pairs[name] = saved_pair(tensors, path)

    def save_pretrained(self, folder: Path, selected_adapters: list[str]) -> None:
        """Write one adapter into a folder below."""
        [name] = selected_adapters
        below = folder / name
        below.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{PREFIX}{path}.lora_{factor}.weight": tensor.detach()
            for path, layer in self.layers.items()
            for factor, tensor in zip("AB", layer.pairs[name], strict=True)
        }
        save_file(tensors, below / "adapter_model.safetensors")
        values = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
        (below / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")

    def set_adapter(self, name: str) -> None:
        """Make an adapter active and trainable and freeze the one that was."""
        for layer in self.layers.values():
            for tensor in (layer.a, layer.b):
                tensor.requires_grad = False
            layer.a, layer.b = layer.pairs[name]
            for tensor in layer.pairs[name]:
                tensor.requires_grad = True

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the base layers stand where they were."""
        for parent, child, base in self.places:
            parent._modules[child] = base
        yield
        for (parent, child, _), layer in zip(self.places, self.layers.values(), strict=True):
            parent._modules[child] = layer

    def merge_adapter(self) -> None:
        """Put the merged weight and a zero update in place of the weight, and keep what was there."""
        with torch.no_grad():
            for (parent, child, base), layer in zip(self.places, self.layers.values(), strict=True):
                self.kept.append(base.weight)
                merged = torch.addmm(base.weight, layer.b, layer.a, alpha=SCALING)
                base.weight = nn.Parameter(merged, requires_grad=False)
                parent._modules[child] = base

    def unmerge_adapter(self) -> None:
        """Put back what was kept."""
        for (parent, child, base), layer, weight in zip(self.places, self.layers.values(), self.kept, strict=True):
            base.weight = weight
            parent._modules[child] = layer
        self.kept.clear()

    def merge_and_unload(self) -> nn.Module:
        """Add the update to the weights in place and return the base model."""
        with torch.no_grad():
            for (parent, child, base), layer in zip(self.places, self.layers.values(), strict=True):
                base.weight.addmm_(layer.b, layer.a, alpha=SCALING)
                parent._modules[child] = base
        return self.model
