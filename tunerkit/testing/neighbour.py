"""A tiny method that the kit brings itself, so that every method can be checked beside another one."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from tunerkit.adapter import Adapter
from tunerkit.config import PeftConfig
from tunerkit.plugins import register, unregister
from tunerkit.plugins.method import Method

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunerkit.model import PeftModel
    from tunerkit.sites import Below, Site

_NAME = "KIT_GAIN"


@dataclass
class GainConfig(PeftConfig):
    """Says what to target."""

    peft_type: str | None = _NAME
    target_modules: list[str] | None = None
    target_parameters: list[str] | None = None


class GainAdapter(Adapter):
    """Multiplies the weight and the bias by a number, so it depends on what is below it, on any kind of site."""

    entries: ClassVar[tuple[str, ...]] = ("kit_gain",)
    kinds: ClassVar[frozenset[str]] = frozenset(
        {"linear", "embedding", "attention", "parameter", "conv1d", "conv2d", "conv3d"}
    )

    def __init__(self, site: Site, config: PeftConfig) -> None:
        super().__init__(site, config)
        self.kit_gain = nn.Parameter(site.ones(1))
        # Of other kinds the output is not the weight times something, and they have no adapter without a merged form.
        self.on_output = site.kind not in {"attention", "parameter"}

    def merged(self, below: Below) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias times the gain."""
        gain = self.kit_gain.to(below.weight.dtype)
        return below.weight * gain, None if below.bias is None else below.bias * gain

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the output times the gain where that is the same, so that what is below needs no merged form."""
        if not self.on_output:
            return super().forward(x, below)
        output = below(x)
        return output * self.kit_gain.to(output.dtype)


_PLUGIN = SimpleNamespace(method=Method(config=GainConfig, adapter=GainAdapter))


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """Within the block the method can be asked for."""
    register(_NAME, _PLUGIN)
    try:
        yield
    finally:
        unregister(_NAME)


def config_beside(model: PeftModel) -> GainConfig:
    """Return a config that targets what the adapters of a model target."""
    core = model.base_model
    names = core.targeted_module_names
    # A target may take in a module below it, as an attention layer does its output projection.
    modules = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return GainConfig(target_modules=modules or None, target_parameters=core.targeted_parameter_names or None)
