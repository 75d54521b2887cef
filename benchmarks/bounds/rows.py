"""What a batch of 64 rows over 32 adapters costs by hand: the bound for `rows.mixed`.

Nothing is checked and nothing is looked up: lists of the factors are ready, and so is the order of the rows. What is
left is what every way has to do that reads the factors as they are now: put them beside one another, and two batched
products. Run it with `python benchmarks/bounds/rows.py`; it prints medians as multiples of the batch with one adapter.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, ADAPTERS, WIDTH, RANK, DEPTH, SCALING = 64, 32, 256, 8, 2, 2.0
EACH = ROWS // ADAPTERS

torch.manual_seed(0)
torch.set_num_threads(1)
X = torch.randn(ROWS, WIDTH)
LAYERS = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
DOWNS = [[torch.randn(RANK, WIDTH) for _ in range(ADAPTERS)] for _ in LAYERS]
UPS = [[torch.randn(WIDTH, RANK) / WIDTH for _ in range(ADAPTERS)] for _ in LAYERS]
BANKS = [(torch.stack(downs), torch.stack(ups)) for downs, ups in zip(DOWNS, UPS, strict=True)]
WHICH = torch.arange(ROWS) % ADAPTERS
ORDER = torch.argsort(WHICH, stable=True)
BACK = torch.argsort(ORDER)


def one_adapter() -> Tensor:
    """Run all rows with the first adapter."""
    x = X
    for layer, downs, ups in zip(LAYERS, DOWNS, UPS, strict=True):
        y = F.linear(x, layer.weight, layer.bias)
        x = torch.addmm(y, F.linear(x, downs[0]), ups[0].t(), alpha=SCALING)
    return x


def in_banks(x: Tensor, y: Tensor, bank_a: Tensor, bank_b: Tensor) -> Tensor:
    """Return the layer's output with each adapter's update on its rows."""
    sorted_x, sorted_y = (tensor.index_select(0, ORDER).view(ADAPTERS, EACH, WIDTH) for tensor in (x, y))
    hidden = torch.bmm(sorted_x, bank_a.mT)
    return torch.baddbmm(sorted_y, hidden, bank_b.mT, alpha=SCALING).view(ROWS, WIDTH).index_select(0, BACK)


def rows_together() -> Tensor:
    """Stack the factors at every call, and run the rows of an adapter together."""
    x = X
    for layer, downs, ups in zip(LAYERS, DOWNS, UPS, strict=True):
        y = F.linear(x, layer.weight, layer.bias)
        x = in_banks(x, y, torch.stack(downs), torch.stack(ups))
    return x


def a_copy_for_each_row() -> Tensor:
    """Stack the factors at every call, and give each row a copy of its own."""
    x = X
    for layer, downs, ups in zip(LAYERS, DOWNS, UPS, strict=True):
        y = F.linear(x, layer.weight, layer.bias)
        bank_a, bank_b = torch.stack(downs).index_select(0, WHICH), torch.stack(ups).index_select(0, WHICH)
        x = torch.baddbmm(y[:, None], torch.bmm(x[:, None], bank_a.mT), bank_b.mT, alpha=SCALING)[:, 0]
    return x


def stacked_before() -> Tensor:
    """Use factors that were stacked once: right only as long as nobody trains, loads or swaps any."""
    x = X
    for layer, banks in zip(LAYERS, BANKS, strict=True):
        x = in_banks(x, F.linear(x, layer.weight, layer.bias), *banks)
    return x


def main(rounds: int = 41, calls: int = 20) -> None:
    """Time the ways alternately and print each as a multiple of one adapter."""
    ways: list[Callable[[], Tensor]] = [one_adapter, rows_together, a_copy_for_each_row, stacked_before]
    times: dict[str, list[float]] = {way.__name__: [] for way in ways}
    with torch.no_grad():
        for way in (a_copy_for_each_row, stacked_before):
            torch.testing.assert_close(way(), rows_together(), atol=1e-4, rtol=1e-4)
        for _ in range(rounds):
            for way in ways:
                start = time.process_time()
                for _ in range(calls):
                    way()
                times[way.__name__].append((time.process_time() - start) / calls)
    for name, taken in times.items():
        ratio = statistics.median(own / one for own, one in zip(taken, times["one_adapter"], strict=True))
        print(f"{name:20}{1e6 * statistics.median(taken):8.0f} us{ratio:8.2f} x one adapter")


if __name__ == "__main__":
    main()
