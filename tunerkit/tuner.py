"""`BaseTuner`: puts adapters into a model, and does to all layers at once what a layer does to its own."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar

from tunerkit import merge
from tunerkit.advice import warn_of
from tunerkit.attach import Newcomer, attach, make_part
from tunerkit.biases import Biases, trained_biases
from tunerkit.config import PeftConfig, check_config, chosen_config
from tunerkit.errors import (
    AdapterNameError,
    AdapterStateError,
    AdapterWarning,
    UnknownAdapterError,
    UnknownMethodError,
)
from tunerkit.fast_path import set_fast_paths
from tunerkit.hook_calls import HookCalls, declared_method, overrides_hooks
from tunerkit.journal import Journal
from tunerkit.layer import BaseTunerLayer, layers_in, original
from tunerkit.modules import cast_up, parameters_in, tensors_in
from tunerkit.modules_to_save import put_copies, tied_copies
from tunerkit.names import RESERVED_NAMES, expose, withdraw
from tunerkit.naming import check_adapter_name, listing, method_id
from tunerkit.plan import Plan, make_plan
from tunerkit.processes import refuse_sharded
from tunerkit.replication import REPLICATION, Replication, wanted_ranges
from tunerkit.routed_model import RoutedModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from tunerkit.adapted_layer import AdaptedLayer
    from tunerkit.adapter import Part
    from tunerkit.plugins.method import Method


class BaseTuner(HookCalls, RoutedModel):
    """A model with adapters.

    Every tuner can hold adapters of every method. A method's own class (`LoraModel`) may override the three methods
    that have the hooks' names, as PEFT's documentation teaches; it is asked whenever an adapter of that method is put
    in, whichever class the tuner is of.

    Args:
        model: The base model. Its layers are replaced in place.
        peft_config: The adapter's config, or several by adapter name, of which one is put in.
        adapter_name: The adapter's name, and which of several configs is meant; if none has it, the only one.
        low_cpu_mem_usage: Make the adapter's tensors on the meta device, to be filled by a checkpoint.
        state_dict: A checkpoint's tensors, to go where they say rather than where the config says.
        autocast_adapter_dtype: Make the adapter's tensors float32 where the base is of lower precision.

    Attributes:
        prefix: What the names of the method's entries start with.
        tuner_layer_cls: The method's layer class.
        target_module_mapping: The default target modules by the model's type.

    Raises:
        TunerkitError: The adapter cannot be put in; the model is as it was.
    """

    prefix: str = ""
    tuner_layer_cls: type[BaseTunerLayer] = BaseTunerLayer
    target_module_mapping: ClassVar[Mapping[str, list[str] | str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "adapter",
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        *,
        autocast_adapter_dtype: bool = False,
    ) -> None:
        super().__init__()
        config, name = chosen_config(peft_config, check_adapter_name(adapter_name, RESERVED_NAMES))
        layers = layers_in(model)
        self.__dict__.update(BaseTuner.around(model, layers).__dict__)
        self.active_adapter: str | list[str] = name
        # A second tuner on the same model finds the base frozen by the first.
        found = [] if layers else dict.fromkeys(parameters_in(model))
        self._were_trainable = [parameter for parameter in found if parameter.requires_grad]
        with Journal() as journal:
            journal.note_module(model)
            journal.note_flags(self._were_trainable)
            for parameter in self._were_trainable:
                parameter.requires_grad = False
            self.peft_config[name] = config
            self.inject_adapter(model, name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    # Which class answers for a method

    def _face_for(self, config: PeftConfig) -> BaseTuner:
        """Return this tuner as its config's method sees it: of that method's class, with the state of this one."""
        if overrides_hooks(type(self)) and self._is_mine(config):
            return self
        kind = self._method_of(config).method.tuner or BaseTuner
        if issubclass(type(self), kind) and not overrides_hooks(type(self)):
            return self
        face: BaseTuner = kind.__new__(kind)
        object.__setattr__(face, "__dict__", self.__dict__)
        return face

    def _is_mine(self, config: PeftConfig) -> bool:
        """Return whether the methods that this class overrides answer for a config."""
        declared = declared_method(type(self))
        if declared is not None:
            return declared == method_id(str(config.peft_type))
        try:
            kind = self._method_of(config).method.tuner
        except UnknownMethodError:
            return True
        return kind is None or issubclass(type(self), kind)

    # What is here

    @property
    def methods(self) -> frozenset[str]:
        """The ids of the methods whose adapters the model holds."""
        return frozenset(method_id(str(config.peft_type)) for config in self.peft_config.values())

    # Putting adapters in and taking them out

    def plan(self, config: PeftConfig, state_dict: dict[str, Tensor] | None = None) -> Plan:
        """Decide which modules an adapter with this config would go to; nothing is changed.

        Args:
            config: The adapter's config.
            state_dict: A checkpoint's tensors, to go where they say rather than where the config says.
        """
        face = self._face_for(config)
        declared = _declared(face, config)
        entries, kinds = (declared.entries, declared.kinds) if declared is not None else ((), frozenset())
        model_config = self.get_model_config(self.model)
        ranges = wanted_ranges(config)
        repeats = self.replication.repeats_more(ranges, self.model)
        model = Replication(self.model, ranges).preview(self.model) if repeats else self.model
        return make_plan(model, config, face, model_config, state_dict, entries, face.prefix, kinds)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put the adapter into the model whose config stands under its name in `peft_config`.

        Cost: one walk over the modules, whatever is attached already.

        Args:
            model: The base model.
            adapter_name: The adapter's name.
            autocast_adapter_dtype: Make the adapter's tensors float32 where the base is of lower precision.
            low_cpu_mem_usage: Make the tensors on the meta device, to be filled by a checkpoint.
            state_dict: A checkpoint's tensors, to go where they say rather than where the config says.

        Raises:
            TunerkitError: The adapter cannot be put in; the model is as it was.
        """
        check_adapter_name(adapter_name, RESERVED_NAMES)
        if adapter_name not in self.peft_config:
            msg = (
                f"peft_config has no entry {adapter_name!r}; it has {listing(self.peft_config)}. Put the adapter's "
                "config there first, or call add_adapter(name, config) on a PeftModel."
            )
            raise UnknownAdapterError(msg)
        config = self.peft_config[adapter_name]
        refuse_sharded(model, "no adapter can be put in: its gradients would not be averaged")
        which = trained_biases(config)
        if which is not None:
            self.biases.check_free()
        with Journal() as journal:
            journal.note_module(self)
            journal.note_module(model)
            if self.replication.repeats_more(wanted_ranges(config), model):
                self.replication = Replication(model, wanted_ranges(config))
                self.replication.apply(journal)
                model.__dict__[REPLICATION] = self.replication
            plan = self.plan(config, state_dict)
            if any(layer.holds(adapter_name) for layer in plan.there):
                msg = (
                    f"The model already has an adapter {adapter_name!r} beside {listing(self.peft_config)}. Choose "
                    "another name, or take it out first with delete_adapter() or unload()."
                )
                raise AdapterNameError(msg)
            face = self._face_for(config)
            newcomer = Newcomer(
                adapter_name,
                method_id(str(plan.config.peft_type)),
                face.tuner_layer_cls,
                self.owner,
                self._make_part(face, plan, adapter_name, meta=low_cpu_mem_usage),
                meta=low_cpu_mem_usage,
                upcast=autocast_adapter_dtype and type(self)._cast_adapter_dtype is BaseTuner._cast_adapter_dtype,
                trains=adapter_name in self.active_adapters and not plan.config.inference_mode,
            )
            create = face.caller("_create_and_replace", plan.config)
            layers, others = attach(create, plan, newcomer, journal, via_hook=not overrides_hooks(type(face)))
            # Copies are of the base model's own, without the biases that another adapter trains.
            shown = self.biases.shown
            self.biases.note(journal)
            self.biases.show(trained=False)
            others += put_copies(plan.copies, adapter_name, self.owner, journal, tied=tied_copies(plan.config))
            self.biases.show(trained=shown)
            if which is not None:
                self.biases = Biases(adapter_name, which, model)
            self.peft_config[adapter_name] = plan.config
            model.__dict__["peft_config"] = self.peft_config
            if newcomer.upcast:
                self._cast_up(others, adapter_name)
            else:
                self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            if plan.there and adapter_name in self.active_adapters:
                self.set_adapter(self.active_adapters, inference_mode=not newcomer.trains)
            else:
                self._activate_new(layers, others, newcomer)
            set_fast_paths(model, journal, disabled=self.disabled, encoders=plan.encoders)
            # A warning may be made an error, and then the adapter is not put in.
            warn_of(plan, None if self.biases.kept else which)

    def _make_part(self, face: BaseTuner, plan: Plan, name: str, *, meta: bool) -> Part | None:
        declared = _declared(face, plan.config)
        if declared is None or declared.part is None or not declared.adapters:
            return None
        part = make_part(declared.part, plan, declared.kinds, meta=meta)
        self.parts[name] = part
        expose(self, self.parts, name)  # type: ignore[arg-type]
        return part

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Make an adapter's tensors float32 where they are of lower precision, those of its part too."""
        if autocast_adapter_dtype:
            self._cast_up(self.layers(), adapter_name)

    def _cast_up(self, layers: list[BaseTunerLayer], name: str) -> None:
        for layer in layers:
            layer.cast_up(name)
        if name in self.parts:
            cast_up(tensors_in(self.parts[name]))

    def _activate_new(self, layers: list[AdaptedLayer], others: list[BaseTunerLayer], newcomer: Newcomer) -> None:
        """Bring the layers of a new adapter to the tuner's state; no other adapter is active with it.

        The others are those that are still to be told whether it trains.
        """
        active, name = self.active_adapters, newcomer.name
        if name in active:
            self.active_adapter = active
            self.biases.show(trained=self.biases.name == name and not self.disabled)
        if name in self._beside():
            self._set_beside(name, trains=newcomer.trains)
        for layer in others:
            if name in active:
                layer._switch(active, [name] if newcomer.trains else [], [])
            else:
                layer._let_train((name,), [], trains=False)
        new: list[BaseTunerLayer] = [layer for layer in layers if len(layer._adapters) == 1]
        new += [layer for layer in others if layer.available_adapters == [name]]
        for layer in new:
            layer._activate(active)
            layer.enable_adapters(not self.disabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out; layers that hold no other become the base layers they were.

        If it was the only active one, the first of the others by name becomes active on all layers, with a warning.

        Raises:
            UnknownAdapterError: There is no such adapter.
            AdapterStateError: It is merged.
        """
        self.check_known([adapter_name])
        refuse_sharded(self.model, "no layer can be taken out of it")
        layers = list(self.layers())
        if any(adapter_name in layer.merged_adapters for layer in layers):
            msg = f"The adapter {adapter_name!r} is merged. Call unmerge_adapter() before deleting it."
            raise AdapterStateError(msg)
        if self.biases.name == adapter_name:
            self.biases.check_unmerged(layers)
        rest = [name for name in self.active_adapters if name != adapter_name]
        others = sorted(name for name in self.peft_config if name != adapter_name)
        with Journal() as journal:
            journal.note_module(self)
            journal.note_module(self.model)
            merge.note_layers(journal, layers)
            if len(rest) == len(self.active_adapters) or rest or not others:
                for layer in layers:
                    layer._activate(rest)
                self.active_adapter = rest
            else:
                msg = f"The active adapter {adapter_name!r} was deleted; {others[0]!r} of {listing(others)} is now."
                warnings.warn(AdapterWarning(msg), stacklevel=2)
                self.set_adapter(others[:1])
            if self.biases.name == adapter_name:
                self._give_up_biases(journal, keep=False)
            for layer in layers:
                layer.delete_adapter(adapter_name)
            merge.unwrap(self.model, journal, only_empty=True)
            set_fast_paths(self.model, journal, disabled=self.disabled)
            del self.peft_config[adapter_name]
            if self.parts.pop(adapter_name, None) is not None:
                withdraw(self, self.parts)  # type: ignore[arg-type]
            if not self.peft_config:
                self.replication.undo(journal)
                self._leave(journal)
            if declared_method(type(self)) not in (None, *self.methods):
                # Python does not ask a class about an object that is of exactly that class.
                journal.note(object.__setattr__, self, "__class__", type(self))
                self.__class__ = BaseTuner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__") or "peft_config" not in self.__dict__:
                raise
        return self.find_call(name, self.model)

    def find_call(self, name: str, otherwise: nn.Module) -> Any:
        """Return what an adapter's method offers under a name, or else the attribute of that name of `otherwise`.

        Raises:
            AdapterStateError: Adapters of several methods offer it.
        """
        found = self._methods_called(name)
        if len(found) > 1:
            msg = f"{name!r} is offered by adapters of several methods, {listing(sorted(found))}: delete one first."
            raise AdapterStateError(msg)
        return next(iter(found.values())) if found else getattr(otherwise, name)

    def _methods_called(self, name: str) -> dict[str, Any]:
        """Return what the methods of the adapters that are here offer under a name, by method or adapter."""
        found: dict[str, Any] = {}
        for adapter, part in self.parts.items():
            if name in part.exposes:
                found[adapter] = getattr(part, name)
        for config in self.peft_config.values():
            face = self._face_for(config)
            if hasattr(type(face), name) and not hasattr(BaseTuner, name):
                found[str(config.peft_type)] = getattr(face, name)
        return found


def plan(model: nn.Module, config: PeftConfig) -> Plan:
    """Show what attaching an adapter would do, without doing it. Printed, it is a table.

    Args:
        model: The base model, or one that has adapters.
        config: The adapter's config.

    Returns:
        For every module whether it would be adapted and why; for every entry of the config how many modules it matches.

    Raises:
        NoMatchingPeftModuleError: Nothing is matched.
        TargetError: The config does not say what to target, and its method has no default for this model.
    """
    return tuner_of(model).plan(check_config(config))


def find_tuner(model: nn.Module) -> BaseTuner | None:
    """Return the tuner that a model is or holds as its `base_model`, or None; the model may be compiled."""
    whole = original(model)
    candidates = (whole, whole._modules.get("base_model"))
    return next((candidate for candidate in candidates if isinstance(candidate, BaseTuner)), None)


def tuner_of(model: nn.Module, *, adapted: bool = False) -> BaseTuner:
    """Return the tuner of a model, or one that is made around it, with whatever adapters were injected into it.

    Args:
        model: The model; it may be compiled.
        adapted: Whether it has to have adapters.

    Raises:
        UnknownAdapterError: It has to have adapters, and has none.
    """
    tuner = find_tuner(model)
    if tuner is None and adapted and not layers_in(model):
        msg = f"The model ({type(model).__name__}) has no adapters. Attach one with get_peft_model(model, config)."
        raise UnknownAdapterError(msg)
    return tuner or BaseTuner.around(original(model))


def _declared(face: BaseTuner, config: PeftConfig) -> Method | None:
    try:
        return face._method_of(config).method
    except UnknownMethodError:
        if overrides_hooks(type(face)):
            return None
        raise
