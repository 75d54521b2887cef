"""What merging has to cost at least: the bounds for `merging.merge` and `memory.unload`.

These loops do, over lists that are ready and without a check, only what tunerkit's promises ask for. Of 4,800 small
layers: a note of what was there, so that an error leaves the model as it was; the folded weight in a parameter of its
own, so that unmerging is exact and no other module that holds the old one changes; a record of both. Of 8 large ones:
the same without the notes, each old weight given up as soon as it has an heir. The floor of the suite adds to the
weight in place instead. Run it with `python benchmarks/bounds/merge.py`; it prints the median of the CPU time in
microseconds a layer, and the peak of memory as a multiple of what base and adapter take.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 20))

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from timing import timed
from torch import Tensor, nn

LAYERS, WIDTH, RANK = 4800, 16, 8
LARGE, LARGE_WIDTH = 8, 2048

torch.set_num_threads(1)


class Layer(nn.Module):
    """A base layer with two factors, and what is merged into it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width, bias=False)
        self.a, self.b = nn.Linear(width, RANK, bias=False), nn.Linear(RANK, width, bias=False)
        self.merged: tuple[tuple[str, ...], dict[str, Any]] | None = None
        self.stack: tuple[str, ...] = ("default",)


def folded(layer: Layer) -> Tensor:
    """Return the weight with the factors folded in."""
    weight, a, b = (part._parameters["weight"] for part in (layer.base, layer.a, layer.b))
    return torch.addmm(weight, b, a, alpha=2.0)


def merge(layers: list[Layer]) -> None:
    """Merge, keeping what was there."""
    notes: list[Any] = []
    with torch.no_grad():
        for layer in layers:
            held = layer.base._parameters
            notes.append((layer, layer.merged, layer.stack, held, held.copy()))
            before = held["weight"]
            held["weight"] = nn.Parameter(folded(layer), requires_grad=False)
            layer.__dict__.update(merged=(("default",), {"weight": before}), stack=())


def give_up(layers: list[Layer]) -> None:
    """Merge, keeping nothing."""
    with torch.no_grad():
        for layer in layers:
            layer.base._parameters["weight"] = nn.Parameter(folded(layer), requires_grad=False)


def peak_of_giving_up() -> float:
    """Return the peak of merging for good, as a multiple of what base and adapter take."""
    give_up([Layer(16)])
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    layers = [Layer(LARGE_WIDTH) for _ in range(LARGE)]
    give_up(layers)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 - before
    return peak / sum(parameter.nbytes for layer in layers for parameter in layer.parameters())


def main() -> None:
    """Print the figures."""
    taken = []
    for _ in range(7):
        layers = [Layer(WIDTH) for _ in range(LAYERS)]
        taken.append(timed(lambda layers=layers: merge(layers), LAYERS)[0])
    print(f"bound, merge_adapter    {statistics.median(taken):6.1f} us")
    # In a process of its own, which has the size from which memory is given back.
    command = (sys.executable, __file__, "peak")
    peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(f"bound, merge_and_unload {float(peak):6.2f} of base and adapter")


if __name__ == "__main__":
    if sys.argv[1:] == ["peak"]:
        print(peak_of_giving_up())
    else:
        main()
