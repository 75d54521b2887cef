"""`AdaptedLayer`: the layer that the core puts in place of one that is adapted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tunerkit.adapter import AdditiveAdapter
from tunerkit.adapter_holder import AdapterHolder
from tunerkit.errors import AdapterStateError, MergeError, RouteError
from tunerkit.folding import Merged, delta_weight, fold, merge_order, rounding, stacked
from tunerkit.layer import own_call, split_input
from tunerkit.modules import set_modes
from tunerkit.names import PerAdapter, per_adapter, withdraw
from tunerkit.naming import listing
from tunerkit.route import BACKWARD, CALL, check_held, current, stack_of
from tunerkit.row_groups import run_layer
from tunerkit.rows import Rows
from tunerkit.sites import SHOWN, Bound, ParameterSite, Site, make_site

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from tunerkit.adapter import Adapter
    from tunerkit.route import Names


class AdaptedLayer(AdapterHolder):
    """A base layer and its adapters, which stand on one another in the order in which they are active.

    `forward` looks nothing up by name and changes nothing; see `AdapterHolder` for what is active.
    """

    follows_routes: ClassVar[bool] = True

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer with the adapters that are active, or that this call is routed to."""
        # What is active is not looked at in a routed call: where it is the same adapter, a graph would mix them up.
        if CALL.route is not None or BACKWARD or (adapter := self._sole) is None or kwargs or len(args) != 1:
            return self._forward(*args, **kwargs)
        site, base = self._site, self._modules["base_layer"]
        return adapter.forward(args[0], site if site.module is base else site.at(base))  # type: ignore[arg-type]

    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        names = self._names()
        if isinstance(names, Rows):
            self._refuse_merged(names.names)
            return run_layer(self.site, self._adapters, names, self._owner, args, kwargs)  # type: ignore[no-any-return]
        stack, site = self._standing(names), self.site
        if not stack or not (args or kwargs):
            return site.module(*args, **kwargs)  # type: ignore[no-any-return]
        x, args, kwargs = split_input(site.owner, args, kwargs)
        return stacked(stack, Bound(site, self.bare_site, args, kwargs))(x)

    def _names(self) -> Names | None:
        """Return the adapters that this thread is routed to now, or None."""
        names = current(self._owner)
        if CALL.route is not None:
            check_held(self._owner)
        return names

    def _standing(self, names: tuple[str, ...] | None) -> tuple[Adapter, ...]:
        """Return the adapters that take part in what this thread does now, from the lowest up."""
        if names is None:
            return self._stack
        self._refuse_merged(names)
        return stack_of(self._owner, self._number, self._adapters, names)

    def _refuse_merged(self, names: tuple[str, ...]) -> None:
        if self._merged is not None:
            msg = (
                f"The layer {self._site.name!r} has {listing(self.merged_adapters)} merged into its weight, so a call "
                f"cannot be routed to {listing(names)}. Call unmerge_adapter() first."
            )
            raise RouteError(msg)

    @property
    def site(self) -> Site:
        """The base layer as it is now, whatever module stands in its place."""
        base = self._modules["base_layer"]
        return self._site if self._site.module is base else self._site.at(base)  # type: ignore[arg-type]

    @property
    def bare_site(self) -> Site:
        """The base layer with its own weight, also while adapters are merged into it."""
        return self.site if self._merged is None else self._merged.bare(self.site)

    def _read(self, name: str) -> Tensor | None:
        """Return the weight or bias of a site whose parameters are read, as a call made here and now would have it."""
        names = self._names()
        if isinstance(names, Rows):
            names = names.none_of(self._adapters, self._site.name)
        site, stack = self.site, self._standing(names)
        if not stack:
            return site.owner._parameters.get(name)
        below = stacked(stack, Bound(site, self.bare_site, (), {}))
        return site.fitted(below.weight, below.bias).get(name)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; where a layer is read rather than called, with what takes part folded in."""
        return self._read("weight") if "weight" in self._site.read else super().weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias; where a layer is read rather than called, with what takes part folded in."""
        return self._read("bias") if "bias" in self._site.read else super().bias

    @property
    def parameter_name(self) -> str | None:
        """The one parameter of the base layer that is adapted here, or None if it is the layer."""
        return self._site.parameter_name if isinstance(self._site, ParameterSite) else None

    # Merging

    @property
    def originals(self) -> dict[str, nn.Parameter | None]:
        """The base layer's own parameters in whose place there are merged ones, by name."""
        return {} if self._merged is None else dict(self._merged.originals)

    @property
    def rounding(self) -> float:
        """How far a quantised weight into which adapters are merged is from the exact one, relative to its norm."""
        return 0.0 if self._merged is None else self._merged.rounding

    @property
    def keeps_base(self) -> bool:
        """Whether the base layer's own parameters are here, in place or beside the merged ones."""
        return self._merged is None or self._merged.kept

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base layer's parameters; the original ones are kept, so unmerging is exact.

        `forget_base` gives them up.

        Args:
            safe_merge: Refuse, with nothing changed, if the result holds NaN or infinities.
            adapter_names: Which; the active ones if not given. Names merged already or not here are passed over.

        Raises:
            MergeError: An adapter has no merged form, or others that stay active stand below it and do not commute.
        """
        if self._disable_adapters:
            msg = f"The adapters of {self._site.name!r} are disabled; enable them before merging."
            raise MergeError(msg)
        names = merge_order(self, self.active_adapters if adapter_names is None else adapter_names)
        if not names:
            return
        site, merged = self.site, self._merged
        bare = site if merged is None else merged.bare(site)
        start, adapters = site, [self._adapters[name] for name in names]
        if site.quantised and merged is not None and merged.kept:  # what is rounded already is not rounded again
            start, adapters = bare, [*(self._adapters[name] for name in merged.names), *adapters]
        tensors = fold(start, bare, adapters, safe=safe_merge)
        error = rounding(start, bare, adapters, tensors) if site.quantised else 0.0
        self.__dict__["_merged"] = (merged or Merged((), {})).put(site, tensors, names, error)
        self._settle()

    def unmerge(self) -> None:
        """Put the base layer's original parameters back.

        Raises:
            MergeError: They were not kept.
        """
        if self._merged is not None:
            self._merged.take_out(self.site)
            self.__dict__["_merged"] = None
            self._settle()

    def dequantize(self) -> None:
        """Put a layer whose weight is not quantised in the base layer's place; what is merged is merged exactly.

        What was merged and the original parameters were not kept stays as it is.
        """
        if not self.site.quantised:
            return
        names = list(self.merged_adapters) if self.keeps_base else []
        if names:
            self.unmerge()
        plain = self.site.dequantised()
        self._modules["base_layer"] = plain
        self.__dict__["_site"] = make_site(plain, self._site.name)
        if names:
            self.merge(adapter_names=names)

    def forget_base(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Give up the original parameters in whose place there are merged ones, so that nothing can be unmerged.

        Returns:
            The parameters that were given up, each with the one in its place.
        """
        if self._merged is None:
            return []
        originals, heirs = self._merged.originals, self.site.owner._parameters
        self.__dict__["_merged"] = self._merged._replace(originals={}, kept=False)
        pairs = ((old, heirs[name]) for name, old in originals.items())
        return [(old, heir) for old, heir in pairs if old is not None and heir is not None]

    def check_not_merged(self, name: str) -> None:
        """Raise `AdapterStateError` if an adapter is merged, so that changing it now would have no effect."""
        if name in self.merged_adapters:
            msg = (
                f"The adapter {name!r} is merged into {self._site.name!r}, so changing it would have no effect there. "
                "Call unmerge_adapter() first."
            )
            raise AdapterStateError(msg)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return by how much an adapter alone changes the base layer's weight; see `tunerkit.folding.delta_weight`."""
        return delta_weight(self.bare_site, self._adapters, adapter_name)

    def check_merge(self, names: Sequence[str]) -> None:
        """Raise `MergeError` if an adapter has no merged form, or would be merged past one it does not commute with."""
        merge_order(self, names)

    def merge_for_good(self, names: list[str]) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Merge adapters and give them up; nothing can be unmerged after that.

        Returns:
            The base layer's parameters that were given up, each with the one in its place.
        """
        self.merge(adapter_names=names)
        pairs, merged = self.forget_base(), self.merged_adapters
        self.__dict__["_merged"] = None
        self.__dict__["_active_adapter"] = [name for name in self.active_adapters if name not in merged]
        for name in merged:
            del self._adapters[name]
        withdraw(self, self._adapters)  # type: ignore[arg-type]
        self._settle()
        return pairs

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether an adapter adds something to the weight, so that it can be turned into a low-rank one."""
        return isinstance(self._adapters.get(adapter_name), AdditiveAdapter)

    # nn.Module

    def _get_name(self) -> str:
        """Return what a printed model calls the layer: its methods and the class of its base, `lora.Linear`."""
        return f"{'+'.join(sorted(self.methods))}.{type(self.get_base_layer()).__name__}"

    def train(self, mode: bool = True) -> AdaptedLayer:
        """Set training mode, for the adapters too, which stand outside the module tree."""
        self.__dict__["training"] = mode
        set_modes((*self._adapters.values(), *self._modules.values()), mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._merged is not None:
            self._merged.apply(fn)
        return self

    def _replicate_for_data_parallel(self) -> AdaptedLayer:
        msg = (
            f"nn.DataParallel cannot copy the layer {self._site.name!r}: its adapters would stay on the first device. "
            "Use torch.nn.parallel.DistributedDataParallel."
        )
        raise AdapterStateError(msg)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") and name not in SHOWN:
                raise
        if name in self._site.read:
            return self._read(name)
        # What the model's own code reads of its layer comes first, then what the adapters have.
        attribute = self._attribute(name)
        if attribute is not None:
            return attribute
        if not hasattr(self.get_base_layer(), name):
            for adapter in self._adapters.values():
                call = own_call(adapter.__dict__["_layer_class"], name)
                if call is not None:
                    return call.__get__(self, type(self))
        return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; one that the adapters have takes a dict with a value for each of them."""
        known = name.startswith("_") or name in self.__dict__ or name in self._modules or hasattr(type(self), name)
        attribute = None if known else self._attribute(name)
        if attribute is None:
            super().__setattr__(name, value)
        else:
            attribute.replace(value)

    def _attribute(self, name: str) -> PerAdapter | None:
        """Return an attribute that adapters have and the base layer has not, by adapter; None if it is no such one."""
        below = hasattr(self.get_base_layer(), name)
        return None if below else per_adapter(self._adapters, name, self.check_not_merged)  # type: ignore[arg-type]


def adapter_of(holder: object, name: str) -> Adapter | None:
    """Return a layer's adapter of a name; None if it has none, or is no such layer. Asked for each layer of a model."""
    return holder._adapters.get(name) if isinstance(holder, AdaptedLayer) else None
