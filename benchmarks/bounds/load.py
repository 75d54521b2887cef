"""What the file side of loading an adapter has to cost at least: the bound for `attach.load` beside that of attaching.

The adapter is in place already, its tensors on the meta device. These loops do, over lists that are ready, only what
tunerkit's promises ask for at each of 4,800 layers: to read the header, and see that the tensors lie one after the
other; to match every key with a tensor of the adapter, and its shape; to give each a storage of its own, and note what
was in its place; to see that nothing is left on the meta device; and to set to evaluation whatever is in training mode,
noting what was. Run it with `python benchmarks/bounds/load.py`; it prints medians of CPU time in microseconds a layer.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timing import timed
from torch import Tensor, nn

LAYERS, WIDTH, RANK, HELD = 4800, 16, 8, 3
SHAPES = {"lora_A": (RANK, WIDTH), "lora_B": (WIDTH, RANK)}

torch.set_num_threads(1)


def layers() -> list[tuple[str, nn.Module, list[nn.Module]]]:
    """Return the layers by path, each with its adapters: three, of which the last is on the meta device."""
    found = []
    for number in range(LAYERS):
        path = f"base_model.model.layers.{number // 100}.experts.{number % 100}.gate_proj"
        adapters = []
        for held in range(HELD):
            adapter = nn.Module()
            for name, shape in SHAPES.items():
                factor = nn.Linear(*reversed(shape), bias=False, device="meta" if held == HELD - 1 else "cpu")
                adapter.add_module(name, factor.requires_grad_(requires_grad=False))
            adapters.append(adapter)
        layer = nn.Module()
        layer.add_module("base_layer", nn.Linear(WIDTH, WIDTH, bias=False))
        for name in SHAPES:
            layer.add_module(name, nn.Module())
        found.append((path, layer, adapters))
    return found


def read_each(path: Path) -> dict[str, Tensor]:
    """Read as safetensors does, and as the floor of the suite."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict


def read_views(path: Path) -> dict[str, Tensor]:
    """Read as views of one mapping."""
    content = np.memmap(path, np.uint8, mode="c")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    flat = torch.frombuffer(content, dtype=torch.float32, count=len(content) // 4)
    tensors, end = {}, start
    for key, item in json.loads(content[8:start].tobytes()).items():
        rows, columns = item["shape"]
        first, last = item["data_offsets"]
        if start + first != end or last - first != rows * columns * 4:
            raise ValueError(key)
        tensors[key] = flat.as_strided((rows, columns), (columns, 1), end // 4)
        end = start + last
    return tensors


def fill(found: list[tuple[str, nn.Module, list[nn.Module]]], tensors: dict[str, Tensor]) -> list[str]:
    """Put the tensors in place."""
    notes: list[Any] = []
    loaded = []
    for path, layer, adapters in found:
        device = layer._modules["base_layer"]._parameters["weight"].device
        for name, held in adapters[-1]._modules.items():
            place = held._parameters
            for leaf, own in place.items():
                if own is None:
                    continue
                key = f"{path}.{name}.{leaf}"
                value = tensors.pop(key)
                if value.shape != own.shape or not own.is_meta:
                    raise ValueError(key)
                notes.append((place, leaf, own))
                new = value.to(device=device, dtype=own.dtype, copy=True)
                place[leaf] = nn.Parameter(new, requires_grad=own.requires_grad)
                loaded.append(key)
    return loaded


def check_and_evaluate(found: list[tuple[str, nn.Module, list[nn.Module]]]) -> None:
    """See that nothing is left on the meta device, and set all modules to evaluation."""
    trained: list[nn.Module] = []
    for _, layer, adapters in found:
        for held in adapters[-1]._modules.values():
            for own in held._parameters.values():
                if own is not None and own.is_meta:
                    raise ValueError(own)
        reached = [layer, *adapters]
        for one in reached:  # which grows meanwhile
            if one.training:
                trained.append(one)
                one.__dict__["training"] = False
            for child in one._modules.values():
                reached.append(child)  # noqa: PERF402 - as a walk over any model does


def main() -> None:
    """Print the medians."""
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.safetensors")
        save_file({f"{at}.{n}.weight": torch.randn(s) for at, _, _ in layers() for n, s in SHAPES.items()}, path)
        for _ in range(7):
            found = layers()
            figures.setdefault("floor, reading", []).append(timed(lambda: read_each(path), LAYERS)[0])
            took, tensors = timed(lambda: read_views(path), LAYERS)
            figures.setdefault("bound, reading", []).append(took)
            took, _ = timed(lambda found=found, tensors=tensors: fill(found, tensors), LAYERS)
            figures.setdefault("bound, filling", []).append(took)
            took, _ = timed(lambda found=found: check_and_evaluate(found), LAYERS)
            figures.setdefault("bound, evaluation", []).append(took)
    for what, taken in figures.items():
        print(f"{what:20} {statistics.median(taken):6.1f} us")


if __name__ == "__main__":
    main()
