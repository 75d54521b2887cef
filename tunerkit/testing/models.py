"""The small models on which methods are checked, at least one for each kind of site."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Sample(Protocol):
    """A small model that knows what kind of sites it has, what to target in it, and what to feed it."""

    kind: ClassVar[str]
    targets: ClassVar[dict[str, list[str]]]

    @staticmethod
    def inputs() -> tuple[Tensor, ...]:
        """Return arguments of the model's forward."""


class Linears(nn.Module):
    """Linear layers with and without a bias, and of unequal and equal sides."""

    kind: ClassVar[str] = "linear"
    targets: ClassVar[dict[str, list[str]]] = {"target_modules": ["wide", "square", "narrow"]}

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 8)
        self.square = nn.Linear(8, 8, bias=False)
        self.narrow = nn.Linear(8, 4)
        self.head = nn.Linear(4, 3)

    @staticmethod
    def inputs() -> tuple[Tensor, ...]:
        """Return a batch of five sequences of three vectors."""
        return (torch.randn(5, 3, 6),)

    def forward(self, x: Tensor) -> Tensor:
        """Return ... x 3 from ... x 6."""
        x = torch.tanh(self.wide(x))
        x = x + torch.tanh(self.square(x))
        return self.head(torch.tanh(self.narrow(x)))  # type: ignore[no-any-return]


class Embeddings(nn.Module):
    """Two tables of vectors."""

    kind: ClassVar[str] = "embedding"
    targets: ClassVar[dict[str, list[str]]] = {"target_modules": ["words", "places"]}

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 6)
        self.places = nn.Embedding(4, 6)
        self.head = nn.Linear(6, 3)

    @staticmethod
    def inputs() -> tuple[Tensor, ...]:
        """Return four sequences that hold every token, and every place in each."""
        return (torch.arange(16).reshape(4, 4) % 12,)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return batch x length x 3."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(torch.tanh(self.words(tokens) + self.places(places)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """A layer that attends to its own input, and one that attends to something else, without biases."""

    kind: ClassVar[str] = "attention"
    targets: ClassVar[dict[str, list[str]]] = {"target_modules": ["near", "far"]}

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.MultiheadAttention(8, 2, batch_first=True)
        self.far = nn.MultiheadAttention(8, 2, bias=False)
        self.head = nn.Linear(8, 3)

    @staticmethod
    def inputs() -> tuple[Tensor, ...]:
        """Return a batch of five sequences of three vectors."""
        return (torch.randn(5, 3, 8) / 4,)

    def forward(self, x: Tensor) -> Tensor:
        """Return batch x length x 3."""
        near, _ = self.near(x, x, x, need_weights=False)
        # Contiguous, for torch multiplies others in a way that depends on whether the weight trains.
        memory = x.transpose(0, 1).contiguous()
        far, _ = self.far(memory / 2, memory, value=memory)
        return self.head(torch.tanh(x + near + far.transpose(0, 1)))  # type: ignore[no-any-return]


class Mixture(nn.Module):
    """Experts whose matrices are stacked in bare parameters, and a router that is a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(3, 6))
        self.up = nn.Parameter(torch.randn(3, 6, 8) / 3)
        self.down = nn.Parameter(torch.randn(3, 8, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return ... x 6 from ... x 6."""
        shares = torch.softmax(x @ self.router.mT, dim=-1)
        hidden = torch.tanh(torch.einsum("...i,eih->...eh", x, self.up))
        return torch.einsum("...eh,eho,...e->...o", hidden, self.down, shares)


class Parameters(nn.Module):
    """A mixture of experts: three bare parameters of one module, a matrix and two stacks of matrices."""

    kind: ClassVar[str] = "parameter"
    targets: ClassVar[dict[str, list[str]]] = {
        "target_parameters": ["experts.router", "experts.up", "experts.down"],
    }

    def __init__(self) -> None:
        super().__init__()
        self.experts = Mixture()
        self.head = nn.Linear(6, 3)

    @staticmethod
    def inputs() -> tuple[Tensor, ...]:
        """Return a batch of five sequences of three vectors."""
        return (torch.randn(5, 3, 6),)

    def forward(self, x: Tensor) -> Tensor:
        """Return ... x 3 from ... x 6."""
        return self.head(x + self.experts(x))  # type: ignore[no-any-return]


class Convolutions(nn.Module):
    """Two convolutions after each other, with everything that a convolution can be set to but groups."""

    targets: ClassVar[dict[str, list[str]]] = {"target_modules": ["first", "second"]}

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return batch x 3 from batch x channels x ..."""
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(hidden.flatten(2).mean(-1))  # type: ignore[no-any-return]


class Convolutions1d(Convolutions):
    """Convolutions over one dimension."""

    kind: ClassVar[str] = "conv1d"

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(3, 6, 3, stride=2, padding=1), nn.Conv1d(6, 4, 2, padding="same", dilation=2, bias=False)
        )

    @staticmethod
    def inputs() -> tuple[Tensor, ...]:
        """Return a batch of five sequences of nine places."""
        return (torch.randn(5, 3, 9),)


class Convolutions2d(Convolutions):
    """Convolutions over two dimensions, the second around the edges."""

    kind: ClassVar[str] = "conv2d"

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
            nn.Conv2d(6, 4, (1, 3), padding=(0, 1), padding_mode="circular", bias=False),
        )

    @staticmethod
    def inputs() -> tuple[Tensor, ...]:
        """Return a batch of five images of six by eight points."""
        return (torch.randn(5, 3, 6, 8),)


class Convolutions3d(Convolutions):
    """Convolutions over three dimensions."""

    kind: ClassVar[str] = "conv3d"

    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(2, 6, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2)),
            nn.Conv3d(6, 4, 1, bias=False),
        )

    @staticmethod
    def inputs() -> tuple[Tensor, ...]:
        """Return a batch of five bodies of three by four by four points."""
        return (torch.randn(5, 2, 3, 4, 4),)


class GroupedConvolutions(Convolutions):
    """Convolutions whose channels are divided into two groups."""

    kind: ClassVar[str] = "conv2d"

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 6, (3, 2), padding=1, groups=2), nn.Conv2d(6, 4, 2, stride=2, groups=2, bias=False)
        )

    @staticmethod
    def inputs() -> tuple[Tensor, ...]:
        """Return a batch of five images of five by six points."""
        return (torch.randn(5, 4, 5, 6),)


SAMPLES: dict[str, type[Sample]] = {
    "linear": Linears,
    "embedding": Embeddings,
    "attention": Attention,
    "parameter": Parameters,
    "conv1d": Convolutions1d,
    "conv2d": Convolutions2d,
    "conv3d": Convolutions3d,
    "grouped conv2d": GroupedConvolutions,
}
"""The models by name: one called like each kind of site, and others for what is particular about some."""


class Recomputed(nn.Module):
    """A model whose forward is run again in the backward, as gradient checkpointing does."""

    def __init__(self, model: nn.Module, *, use_reentrant: bool) -> None:
        super().__init__()
        self.model = model
        self.use_reentrant = use_reentrant
        if hasattr(model, "config"):
            self.config = model.config

    def forward(self, *inputs: Tensor) -> Any:
        """Return what the model returns."""
        # The re-entrant form gives no gradients unless some input of it has one, and whole numbers cannot.
        spark = torch.zeros((), requires_grad=True)
        return checkpoint(self._run, spark, *inputs, use_reentrant=self.use_reentrant)

    def _run(self, spark: Tensor, *inputs: Tensor) -> Any:
        del spark
        return self.model(*inputs)
