"""The base models that are adapted, and the numbers that every side puts into its adapters."""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK = 8
ALPHA = 16
SCALING = ALPHA / RANK
MIXTURE_WIDTH = 16


class Expert(nn.Module):
    """A gated feed-forward block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, width)
        self.up_proj = nn.Linear(width, width)
        self.down_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the expert adds, rows x width."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Four projections and some experts; every one is run, so that all take part in the output."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, rows x width."""
        x = x + self.o_proj(torch.tanh(self.q_proj(x) + self.k_proj(x) + self.v_proj(x)))
        # Their mean: with their sum, 48 layers make a difference of 1e-8 in the weights one of 4e-3 in the output.
        added: Tensor = sum(expert(x) for expert in self.experts) / len(self.experts)
        return F.layer_norm(x + added, x.shape[-1:])


def mixture(layers: int, experts: int) -> nn.Module:
    """Return a mixture of experts of `layers` x (4 + 3 x `experts`) linear layers, with the same numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(Layer(MIXTURE_WIDTH, experts) for _ in range(layers))).eval()


def stack(width: int, depth: int) -> nn.Module:
    """Return linear layers one after the other, with the same numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).eval()


def targets(model: nn.Module) -> list[str]:
    """Return the names of a model's linear layers, as `target_modules` wants them: the last part of their paths."""
    paths = (path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def inputs(rows: int, width: int) -> Tensor:
    """Return a batch, rows x width, with the same numbers every time."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


def numbers(path: str, factor: str, adapter: str, tensor: Tensor) -> Tensor:
    """Return what a factor of an adapter holds where outputs are compared: the same numbers on every side.

    Args:
        path: The path of the layer in the base model.
        factor: "A" or "B".
        adapter: The adapter's name.
        tensor: The factor.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{path} {factor} {adapter}".encode()))
    return torch.randn(tensor.shape, generator=generator) / (2 * math.sqrt(tensor.shape[-1]))
