"""`MethodConformance`: the class that an author subclasses."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

import pytest

from tunerkit.model import get_peft_model
from tunerkit.plugins import get_method
from tunerkit.testing.bench import Bench
from tunerkit.testing.calls import CallChecks
from tunerkit.testing.files import FileChecks
from tunerkit.testing.graphs import GraphChecks
from tunerkit.testing.lifecycle import LifecycleChecks
from tunerkit.testing.maths import MathsChecks
from tunerkit.testing.merging import MergingChecks
from tunerkit.testing.mixing import MixingChecks
from tunerkit.testing.models import SAMPLES
from tunerkit.testing.precision import PrecisionChecks
from tunerkit.testing.routes import RouteChecks
from tunerkit.testing.rows import RowChecks
from tunerkit.testing.state import StateChecks
from tunerkit.testing.summary import Summary, leave_out, note
from tunerkit.testing.wholes import WholeModuleChecks

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from tunerkit.config import PeftConfig
    from tunerkit.model import PeftModel


class MethodConformance(
    # pytest runs what the last of them defines first: the basic checks, on which the others stand.
    WholeModuleChecks,
    CallChecks,
    GraphChecks,
    PrecisionChecks,
    StateChecks,
    RowChecks,
    RouteChecks,
    MixingChecks,
    LifecycleChecks,
    FileChecks,
    MergingChecks,
    MathsChecks,
):
    """Every check that the core relies on, for one method.

    An author subclasses it, calls the subclass `Test...`, and defines `config`. Each check is run on every kind of site
    in `kinds`, on small models of the kit's own (`tunerkit.testing.models.SAMPLES`). To check on another model,
    override `make_model` and `make_inputs`, and let `config` say what to target in it.

    Attributes:
        kinds: The kinds of sites to check on, or other names of the kit's models; every model of a kind that the
            adapter class declares, if this is not set.
        tolerance: The greatest difference between two outputs that count as equal, in single precision.
        absent: The checks that do not hold for the method, by name, with the reason; the report shows them as skipped.
        xfail: The checks that ought to hold and do not yet, by name, with the reason; one that passes counts as failed.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[float] = 1e-5
    absent: ClassVar[dict[str, str]] = {}
    xfail: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls) -> None:
        """Refuse what would leave out a check without a word.

        Raises:
            TypeError: A check is overridden, or `absent` or `xfail` names none or gives no reason.
        """
        super().__init_subclass__()
        checks = {name for name in dir(MethodConformance) if name.startswith("test_")}
        for name in sorted(checks):
            if getattr(cls, name) is not getattr(MethodConformance, name):
                msg = (
                    f"{cls.__name__} overrides the check {name!r}, so it would not be run. Give the method's own tests "
                    "other names; to leave a check out, write absent = {" + f"{name!r}: 'the reason'" + "}."
                )
                raise TypeError(msg)
        for attribute, declared in (("absent", cls.absent), ("xfail", cls.xfail)):
            for name, reason in declared.items():
                if name not in checks:
                    msg = (
                        f"{cls.__name__}.{attribute} names {name!r}, which is no check. The checks are "
                        f"{sorted(checks)}."
                    )
                    raise TypeError(msg)
                if not str(reason or "").strip():
                    msg = (
                        f"{cls.__name__}.{attribute} gives no reason for leaving out {name!r}. Say why it cannot hold."
                    )
                    raise TypeError(msg)
        if both := sorted(cls.absent.keys() & cls.xfail.keys()):
            msg = f"{cls.__name__} declares {both} both absent and xfail. A check that does not apply is absent only."
            raise TypeError(msg)

    # What an author defines

    def config(self) -> PeftConfig:
        """Return a new config of the method. Without targets it gets those of the kit's model."""
        msg = f"{type(self).__name__} must define config(self), which returns the method's config."
        raise NotImplementedError(msg)

    def make_model(self, kind: str) -> nn.Module:
        """Return a new base model with sites of a kind, with the same numbers whenever torch's seed is the same.

        Args:
            kind: One of `kinds`.
        """
        return SAMPLES[kind]()  # type: ignore[return-value]

    def make_inputs(self, kind: str) -> tuple[Tensor, ...]:
        """Return positional arguments for the model's forward, a batch of several rows.

        Args:
            kind: One of `kinds`.
        """
        return SAMPLES[kind].inputs()

    # What the kit adds

    def targeted(self, config: PeftConfig, kind: str) -> PeftConfig:
        """Return a config with the targets of the kit's model, if it has none and the model is the kit's."""
        chosen = any(getattr(config, name, None) is not None for name in ("target_modules", "target_parameters"))
        if not chosen and type(self).make_model is MethodConformance.make_model:
            for name, targets in SAMPLES[kind].targets.items():
                setattr(config, name, set(targets) if name in config._sets else list(targets))
        return config

    def attach(self, model: nn.Module, config: PeftConfig, name: str) -> PeftModel:
        """Return the model with an adapter."""
        return get_peft_model(model, config, name)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each check once for each kind of site."""
        if "kind" in metafunc.fixturenames:
            Summary.register(metafunc.config)
            metafunc.parametrize("kind", self.kinds or self._declared_kinds())

    def _declared_kinds(self) -> list[str]:
        kinds = get_method(str(self.config().peft_type)).method.kinds
        return [name for name, sample in SAMPLES.items() if sample.kind in (kinds or {"linear"})]

    @pytest.fixture
    def bench(self, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
        """Return what a check works with, unless the check is declared absent."""
        check = request.function.__name__
        note(request.node, f"{self.config().peft_type} ({type(self).__name__})")
        if check in self.xfail:
            request.node.add_marker(pytest.mark.xfail(reason=self.xfail[check], strict=True))
        if check in self.absent:
            leave_out(request.node, self.absent[check])
        return Bench(self, kind, tmp_path, functools.partial(leave_out, request.node))
