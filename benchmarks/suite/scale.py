"""How large the models of a run are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Sizes of models; what is reported as a figure of this repository is `FULL`.

    Attributes:
        name: What the scale is called in results.
        layers: The layers of the mixture of experts.
        experts: The experts of each, with three linear layers beside the four of its attention.
        many_experts: The experts of each in the largest mixture.
        adapters: How many adapters stand on one model where there are many.
        copies: The rows of a mixed batch over many adapters.
        blocks: The linear layers of the model whose memory is measured.
        block_width: Their width.
        effort: The factor before the number of calls within one timing.
        slow: Run also the sides that take minutes.
    """

    name: str
    layers: int = 48
    experts: int = 32
    many_experts: int = 128
    adapters: int = 1000
    copies: int = 64
    blocks: int = 8
    block_width: int = 2048
    effort: float = 1.0
    slow: bool = False


FULL = Scale("full")
SHORT = Scale(
    "short",
    layers=2,
    experts=2,
    many_experts=4,
    adapters=12,
    copies=8,
    blocks=2,
    block_width=64,
    effort=0.05,
)
