"""What the author of a method writes: `Adapter`, or `AdditiveAdapter` for methods that add to the weight, and `Part`.

An adapter is one object at one site. It holds its tensors under the names they have in a checkpoint and knows its
maths; which adapters are active, merged or frozen, and what kind of layer this is, is the business of others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tunerkit.alike import run_alike
from tunerkit.errors import AdapterStateError, UnsupportedSiteError
from tunerkit.lean import LeanModule, Linear
from tunerkit.naming import closest
from tunerkit.sites import Bound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from tunerkit.config import PeftConfig
    from tunerkit.rows import Groups
    from tunerkit.sites import Below, Site

_ROUNDING = 4
"""By how many times the precision of its numbers a weight may differ from one that is the same."""

_ALIKE = 0.8
"""How much a name must look like a word that is missing to be taken for it."""


class NoPart:
    """What an adapter class has in place of a part: an adapter that has joined one finds that first, in itself."""

    def __get__(self, adapter: Adapter | None, kind: type[Adapter]) -> Any:
        """Refuse to give what there is not; of a class there is nothing to refuse."""
        if adapter is None:
            return self
        # No AttributeError: in its place torch would raise another, which says less.
        msg = (
            f"This {kind.__name__} has no part. Declare one, Method(part=...), and read self.part in `forward`, "
            "`merged` or `delta`: while `__init__` runs, there is none yet."
        )
        raise AdapterStateError(msg)


class Adapter(LeanModule):
    """One method's maths at one site.

    A subclass makes its tensors in `__init__(self, site, config)` and says in `merged` what the layer's parameters are
    with the adapter folded in. Tensors that are registered with `requires_grad=False` stay frozen.

    Attributes:
        entries: The names of the attributes that hold its tensors, as they stand in a checkpoint's keys.
        kinds: The kinds of sites it adapts (`Site.kind`).
        unfoldable: Why this adapter has no merged form, so that only its own `forward` is run; None if it has one.
        commutes: Whether it adds something that depends on neither the adapters below it nor their order.
        crosses_rows: Why what it does with a row of a batch depends on the other rows, so that rows of one batch cannot
            have adapters of their own; None if it does not.
        settings: The names of the plain numbers that `forward` reads and that the config decides, such as a scaling.
        base_like: The names of buffers that stand in for the layer's own tensors, and keep the dtype of these.
        part: What this adapter shares with those of the same name at other sites, if the method has a `Part`; it is
            there once `join` was called, and to read it before is an `AdapterStateError`.

    Args:
        site: The bare layer, which makes tensors of the right size, dtype and device (`Site.zeros`).
        config: The completed config.
    """

    entries: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    unfoldable: str | None = None
    commutes: bool = False
    crosses_rows: str | None = None
    settings: ClassVar[tuple[str, ...]] = ()
    base_like: ClassVar[tuple[str, ...]] = ()
    part: Part = NoPart()  # type: ignore[assignment]

    def __init__(self, site: Site, config: PeftConfig) -> None:
        del site, config
        super().__init__()

    def merged(self, below: Below) -> tuple[Tensor, Tensor | None]:
        """Return the layer's weight and bias with this adapter folded in, changing nothing.

        Args:
            below: The layer with the adapters under this one.

        Returns:
            The weight, of the shape of `below.weight`, and the bias, which may be one where there was none.
        """
        msg = (
            f"{type(self).__name__} must define merged(below), or forward(x, below) and unfoldable."
            f"{_meant(type(self), 'merged')}"
        )
        raise NotImplementedError(msg)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the layer's output with this adapter; a subclass may have a cheaper way to the same result.

        Args:
            x: The layer's input, ... x in for a linear layer. It must not be changed.
            below: The layer with the adapters under this one; `below(x)` is its output.

        Returns:
            The output, of the shape and dtype of `below(x)`.
        """
        return below.run(x, *self.merged(below))

    @classmethod
    def forward_rows(cls, adapters: Sequence[Self], x: Tensor, below: Below, groups: Groups) -> Tensor:
        """Return the layer's output for a batch in which each row has one of several adapters.

        This calls the `forward` of each on its rows, of adapters that are alike at once. A subclass may have a cheaper
        way to the same result. Subclasses of that one go the cheaper way too, but for those that change `forward`,
        `merged` or `delta`.

        Args:
            adapters: One for each group of rows, at least two.
            x: The layer's input, rows x ...
            below: The layer. What it is asked for with `x` itself is computed once.
            groups: The rows by adapter.

        Returns:
            The output, its rows in the order of those of `x`.
        """
        return run_alike(adapters, x, below, groups)  # type: ignore[no-any-return]

    def together(self, others: Sequence[Adapter]) -> str | None:
        """Return why this adapter cannot be active on a layer together with these others, or None if it can.

        Args:
            others: The other adapters of the layer that are to be active, of whatever methods.
        """
        del others
        return None

    def has_effect(self, base: Site) -> bool:
        """Return whether this adapter changes the layer by more than rounding does.

        One that has no merged form counts as if it did; a subclass that knows better says so.

        Args:
            base: The bare layer.
        """
        if self.unfoldable is not None:
            return True
        with torch.no_grad():
            before = base.weight, base.bias
            after = self.merged(Bound(base, base, (), {}))
            return any(_differ(*pair) for pair in zip(before, after, strict=True))

    def join(self, part: Part) -> None:
        """Take in the part that all adapters of this name share; called once, before the adapter is used.

        Args:
            part: The part, of the class that `Method.part` names. From then on it is `self.part`.
        """
        self.__dict__["part"] = part

    def tie(self, other: object) -> None:
        """Take the tensors of another new adapter for its own: that of a module that holds the same weight.

        It is called before either is used. What is trained is then one, as the weight is: an output layer gives the
        tokens the vectors that the input embedding gives them.

        Args:
            other: The other module's adapter, or whatever its method put in there.

        Raises:
            UnsupportedSiteError: The two cannot share their tensors.
        """
        msg = (
            f"Two modules share a weight, and a {type(self).__name__} cannot share its tensors with a "
            f"{type(other).__name__} (ensure_weight_tying=True). Leave ensure_weight_tying out, or target neither."
        )
        raise UnsupportedSiteError(msg)

    def take(self, other: Adapter) -> None:
        """Take over the numbers and settings of another adapter of this class for the same site, in place.

        What holds the tensors meanwhile, a compiled model or an optimiser, goes on with the new numbers.

        Args:
            other: The adapter whose numbers are taken; it is left as it is.

        Raises:
            AdapterStateError: The tensors have other shapes; nothing was changed.
        """
        theirs = other.state_dict()
        mine = self.state_dict(keep_vars=True)
        for key, tensor in mine.items():
            if tensor.shape != theirs[key].shape:
                msg = (
                    f"{key!r} is {tuple(theirs[key].shape)} there and {tuple(tensor.shape)} here, so it cannot be "
                    "swapped in place. Load it as another adapter."
                )
                raise AdapterStateError(msg)
        with torch.no_grad():
            for key, tensor in mine.items():
                tensor.copy_(theirs[key])
            for name in self.settings:
                own = getattr(self, name)
                if isinstance(own, Tensor):
                    own.fill_(getattr(other, name))
                else:
                    setattr(self, name, getattr(other, name))

    def make_room(self, rank: int | None, device: torch.device) -> None:
        """Prepare for `take` under a compiled model, which must not see that anything but numbers in tensors changed.

        The plain numbers in `settings` become tensors. A method with ranks also fills its tensors up with zeros.

        Args:
            rank: The largest rank to come, if ranks are to change; methods without ranks pass it over.
            device: The device of the layer.

        Raises:
            AdapterStateError: The adapter's rank is larger.
        """
        del rank
        for name in self.settings:
            setattr(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float32, device=device))

    def to_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this adapter's tensors in the form in which a checkpoint holds them, by their keys below the layer.

        Where that is the form in which it holds them itself, the very dict is returned.

        Args:
            tensors: The adapter's tensors by the names it has for them, such as `toy_up.weight`.
        """
        return tensors

    def from_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors in the form in which this adapter holds them: `to_checkpoint` in reverse.

        Args:
            tensors: The checkpoint's tensors for this adapter, by their keys below the layer.
        """
        return tensors

    def standalone(self, tensors: dict[str, Tensor], initial: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Return tensors that say all of what this adapter does, to a base that nothing was taken off.

        A method whose adapters lean on something that a checkpoint does not hold (a start that is derived again) has
        this form beside its own, and says what config goes with it in `PeftConfig.standalone`.

        Args:
            tensors: The adapter's tensors in the form of a checkpoint, by their keys below the layer.
            initial: The same tensors as they were before training, if they were saved; the effect that they have is to
                be taken off.
        """
        del initial
        return tensors


class AdditiveAdapter(Adapter):
    """A method that adds something to the weight: it defines `delta`, or `product` where that is one.

    Attributes:
        commutes: What is added depends on the bare layer alone, so such adapters may be merged in any order.
    """

    commutes: bool = True

    def delta(self, base: Site) -> Tensor:
        """Return what is added to the weight.

        Args:
            base: The bare layer.

        Returns:
            A tensor with as many numbers as `base.weight`.
        """
        product = self.product(base)
        if product is None:
            msg = f"{type(self).__name__} must define delta(base).{_meant(type(self), 'delta')}"
            raise NotImplementedError(msg)
        left, right, scaling = product
        return (scaling * left) @ right

    def product(self, base: Site) -> tuple[Tensor, Tensor, float | Tensor] | None:
        """Return what is added to the weight as the product of two factors, or None if it is not one.

        Then it is merged without a tensor of the weight's size besides the weights.

        Args:
            base: The bare layer.

        Returns:
            `L`, rows x r, `R`, r x columns, and `s`, a number: `s L R` is a matrix in the form of `base.weight`.
        """
        del base
        return None

    def delta_bias(self, base: Site) -> Tensor | None:
        """Return what is added to the bias, of size out, or None; the layer itself may have no bias.

        Args:
            base: The bare layer.
        """
        del base
        return None

    def merged(self, below: Below) -> tuple[Tensor, Tensor | None]:
        """Return the weight plus `delta`, and the bias plus `delta_bias`."""
        weight, bias, added = below.weight, below.bias, self.delta_bias(below.base)
        if added is not None:
            bias = added if bias is None else bias + added
        return weight + self.delta(below.base).reshape(weight.shape), bias


class Part(nn.Module):
    """The half of an adapter that exists once per model: tensors that all its sites share, and what surrounds a call.

    It is made after planning from all sites, before the adapters, and each of them is then given it by `Adapter.join`.

    Attributes:
        entries: The names of the attributes that hold its tensors, as they stand in a checkpoint's keys.
        exposes: The names of the part's methods that can be called on the model.

    Args:
        sites: All sites of the adapter.
        config: The completed config.
    """

    entries: ClassVar[tuple[str, ...]] = ()
    exposes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, sites: Sequence[Site], config: PeftConfig) -> None:
        del sites, config
        super().__init__()

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model for a call in which this adapter takes part; a subclass may do something before and after.

        Args:
            call: The model's own call.
            args: Its arguments.
            kwargs: Its arguments by name.

        Returns:
            What `call` returned, or what is to be returned in its place.
        """
        return call(*args, **kwargs)

    @classmethod
    def surrounds(cls) -> bool:
        """Return whether this does something around a call of the model, as opposed to holding tensors only."""
        return cls.around is not Part.around


def _meant(kind: type[Adapter], word: str) -> str:
    """Return a sentence about a name that a class defines and that may be meant as a word of the contract, if any."""
    near = closest(word, sorted({*dir(kind)} - {*dir(AdditiveAdapter)}), count=1, cutoff=_ALIKE)
    return f" It defines `{near[0]}`: did you mean `{word}`?" if near else ""


def _differ(before: Tensor | None, after: Tensor | None) -> bool:
    if before is None or after is None:
        return any(one is not None and bool(one.any()) for one in (before, after))
    wide = torch.promote_types(before.dtype, torch.float32)
    change = (after.to(wide) - before.to(wide)).norm()
    # Tensors of adapters are seldom more precise than float32, whatever the layer's are.
    precision = max(torch.finfo(before.dtype).eps, torch.finfo(torch.float32).eps)
    # Asked this way round because of NaN, which is a change.
    return not bool(change <= _ROUNDING * precision * before.to(wide).norm())


def linear(weight: Tensor, bias: Tensor | None = None, *, trains: bool = True) -> nn.Linear:
    """Return an `nn.Linear` that holds a ready-made weight.

    The constructor of `nn.Linear` would first fill a weight of its own at random, which costs five times as much.

    Args:
        weight: The weight, out x in.
        bias: The bias, of size out, or None.
        trains: Whether they are to be trained.

    Returns:
        The layer. It holds these very tensors, so it has their dtype and device.
    """
    return Linear(weight, bias, trains=trains)
