"""`AdaptedModel`: does to all layers of a model at once what a layer with adapters does to its own."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from tunerkit import merge
from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.biases import Biases
from tunerkit.errors import AdapterNameError, ArgumentError, MergeWarning, UnknownAdapterError
from tunerkit.fast_path import set_fast_paths
from tunerkit.journal import Journal
from tunerkit.layer import BaseTunerLayer, MethodMeta, layers_in, tuner_layers
from tunerkit.model_config import config_dict, config_of
from tunerkit.modules import Hook, remove_hooks, set_modes
from tunerkit.names import withdraw
from tunerkit.naming import closest, given_names, listing
from tunerkit.processes import refuse_sharded
from tunerkit.replication import REPLICATION, Replication
from tunerkit.route import Owner
from tunerkit.targeting import adapted_places

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from tunerkit.adapter import Part
    from tunerkit.config import PeftConfig

Model = TypeVar("Model", bound="AdaptedModel")


class AdaptedModel(nn.Module, metaclass=MethodMeta):
    """A model into which adapters were put, and what they have once per model.

    Attributes:
        model: The base model.
        config: The base model's own config, or a dict that says it has none.
        peft_config: The completed configs by adapter name.
        active_adapter: The active adapter, or several in the order in which they stand on one another.
        disabled: Whether all adapters are switched off.
        parts: What adapters have once per model, by adapter name.
        biases: The base model's biases that an adapter trains, if one does.
        replication: The base model's layers that are repeated, if any are.
        hooks: The hooks that the base model got for gradient checkpointing, each with its module.
        owner: Stands for this model in its layers and in routes.
    """

    model: nn.Module
    peft_config: dict[str, PeftConfig]
    active_adapter: str | list[str]
    disabled: bool
    parts: dict[str, Part]
    biases: Biases
    replication: Replication
    hooks: list[Hook]
    owner: Owner
    _were_trainable: list[nn.Parameter]
    _trained_parts: list[nn.Parameter]

    @classmethod
    def around(cls, model: nn.Module, layers: Sequence[BaseTunerLayer] | None = None) -> Self:
        """Return a tuner around a model as it is, with whatever adapters were put in before; nothing is changed.

        Args:
            model: The model.
            layers: Its layers with adapters, if they are known.
        """
        layers = layers_in(model) if layers is None else layers
        owners = [layer._owner for layer in layers if layer.follows_routes]
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner._modules["model"] = model
        tuner.__dict__.update(
            training=model.training,
            parts={},
            biases=Biases(),
            replication=model.__dict__.get(REPLICATION, Replication()),
            hooks=[],
            owner=owners[0] if owners else Owner(),
            peft_config=model.__dict__.get("peft_config", {}),
            active_adapter=layers[0].active_adapters if layers else [],
            disabled=bool(layers) and layers[0].disable_adapters,
            _were_trainable=[],
            _trained_parts=[],
        )
        return tuner

    # What is here

    @property
    def config(self) -> Any:
        """The base model's own config as it is there, or a dict that says it has none."""
        return config_of(self.model)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in the order in which they stand on one another."""
        active = self.active_adapter
        return [active] if isinstance(active, str) else list(active)

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the modules that are adapted now."""
        return [path for path, layer in tuner_layers(self.model) if layer.targeted and _parameter_of(layer) is None]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The paths of the parameters that are adapted by themselves now."""
        found: dict[str, list[str]] = {}
        for path, layer in adapted_places(self.model):
            name = _parameter_of(layer)
            if name is not None:
                # The layers of one module's parameters stand on one another, the first at the bottom.
                found.setdefault(path, []).insert(0, name)
        return [f"{path}.{name}" for path, names in found.items() for name in names]

    def layers(self) -> list[BaseTunerLayer]:
        """Return the layers with adapters."""
        return layers_in(self.model)

    @staticmethod
    def get_model_config(model: nn.Module, default: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a model's own config as a dict, `default` or one that says it is custom if the model has none."""
        return config_dict(model, default)

    def check_known(self, names: Sequence[str]) -> None:
        """Raise `UnknownAdapterError` if the model lacks one of the adapters."""
        for name in names:
            if name not in self.peft_config:
                near = closest(str(name), self.peft_config)
                hint = f" Closest: {listing(near)}." if near else ""
                msg = f"The model has no adapter {name!r}; it has {listing(self.peft_config)}.{hint}"
                raise UnknownAdapterError(msg)

    def _names(self, given: object) -> list[str]:
        """Return what a caller passed as one name or several, each once and known."""
        names = given_names(given, self.peft_config)
        self.check_known(names)
        return names

    # What is active, and what trains

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active and trainable, and freeze the others.

        Several stand on one another in the order given. What is merged is taken out first, with a warning.

        Args:
            adapter_name: One name or several.
            inference_mode: Keep the active ones frozen too.

        Raises:
            UnknownAdapterError: There is no such adapter.
            AdapterStateError: They cannot be active together.
        """
        names = self._names(adapter_name)
        if not names:
            msg = (
                f"set_adapter got no name; the model has {listing(self.peft_config)}. To run the base model use "
                "disable_adapter()."
            )
            raise AdapterNameError(msg)
        layers = self.layers()
        self._check_together(layers, names)
        if any(layer.merged for layer in layers):
            msg = "Adapters were merged; they are unmerged before others become active."
            warnings.warn(MergeWarning(msg), stacklevel=2)
        with Journal() as journal:
            self._note(journal, layers)
            if any(layer.merged for layer in layers):
                self.unmerge_adapter()
            trains, changed = [] if inference_mode else names, journal.note_changes()
            for layer in layers:
                layer._switch(names, trains, changed)
            self.active_adapter = adapter_name if isinstance(adapter_name, str) else names
            for name in self._beside():
                self._set_beside(name, trains=name in names and not inference_mode)
            self.biases.show(trained=self.biases.name in names and not self.disabled)

    def _note(self, journal: Journal, layers: Sequence[BaseTunerLayer]) -> None:
        """Note which adapters are active and which of their tensors train, before either changes."""
        journal.note_module(self)
        merge.note_activity(journal, layers)
        for part in self.parts.values():
            journal.note_module(part)
            journal.note_flags(part.parameters())
        self.biases.note(journal)

    def _beside(self) -> set[str]:
        """Return the names of the adapters that train something beside what their layers hold."""
        return {*self.parts, self.biases.name} - {""}

    @staticmethod
    def _check_together(layers: list[BaseTunerLayer], names: Sequence[str]) -> None:
        for layer in layers if len(names) > 1 else ():
            layer.check_together(names)

    def _set_beside(self, name: str, *, trains: bool) -> None:
        """Say whether an adapter's part and biases train; while it is switched off, they will when it is on again."""
        tensors: list[nn.Parameter] = []
        if name in self.parts:
            part = self.parts[name]
            tensors += [parameter for key, parameter in part.named_parameters() if key not in part.__dict__["_frozen"]]
        # Where the biases' trained values are not in place, the base model's own would be trained.
        if self.biases.name == name and (not trains or name in self.active_adapters):
            tensors += self.biases.parameters()
        if self.disabled:
            others = [known for known in self._trained_parts if not any(known is tensor for tensor in tensors)]
            self._trained_parts = [*others, *(tensors if trains else [])]
        for tensor in tensors:
            tensor.requires_grad_(trains and not self.disabled)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Say whether adapters train, whether they are active or not; unknown names are passed over, as in PEFT."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        with Journal() as journal:
            layers = self.layers()
            self._note(journal, layers)
            changed = journal.note_changes()
            for layer in layers:
                layer._let_train(names, changed, trains=requires_grad)
            for name in self._beside():
                if name in names:
                    self._set_beside(name, trains=requires_grad)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off: the model is the base model, bit for bit."""
        self._enable(enabled=False)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again that `disable_adapter_layers` switched off, as they were."""
        self._enable(enabled=True)

    def _enable(self, *, enabled: bool) -> None:
        with Journal() as journal:
            layers = self.layers()
            self._note(journal, layers)
            changed = journal.note_changes()
            if enabled:  # before what was merged is merged again
                self.biases.show(trained=self.biases.name in self.active_adapters)
            # Where one layer's base holds another's, what was merged last is taken out first.
            for layer in layers if enabled else reversed(layers):
                if not isinstance(layer, AdaptedLayer) or layer.merged or layer._merged_before:
                    merge.note_parameters(journal, layer)
                layer._switch_on(changed, enabled=enabled)
            if not enabled and not self.disabled:
                beside = [p for part in self.parts.values() for p in part.parameters()] + self.biases.parameters()
                self._trained_parts = [p for p in beside if p.requires_grad]
                self.biases.show(trained=False)
            self.disabled = not enabled
            set_fast_paths(self.model, journal, disabled=self.disabled)
            for parameter in self._trained_parts:
                parameter.requires_grad_(enabled)
            if enabled:
                self._trained_parts = []

    # Merging

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, *, keep_base: str = "device"
    ) -> None:
        """Fold adapters into the base model's parameters; the originals are kept, so unmerging is exact.

        They take as much memory as what is merged into. With `keep_base="cpu"` they wait in the CPU's memory; those
        that other modules hold too stay. With "none" they are given up, layer by layer, so that the memory of one layer
        is enough. Then nothing can be unmerged: `unmerge_adapter`, `disable_adapter`, `set_adapter` and whatever else
        needs the base model are refused; merging more and `merge_and_unload` are not. What can be refused is refused
        before the first layer is changed. If the call is interrupted later, the layers done so far stay merged: the
        model computes what it did, and a second call does the rest.

        Args:
            adapter_names: Which; the active ones if not given.
            safe_merge: Refuse, with nothing changed, if a result holds NaN or infinities.
            keep_base: Where the originals are kept: "device" (where they are), "cpu" or "none".

        Raises:
            UnknownAdapterError: There is no such adapter.
            ArgumentError: `keep_base` is none of the three.
            MergeError: An adapter cannot be merged; nothing was changed.
        """
        merge.check_keep(keep_base, self.biases)
        names = self._to_merge(adapter_names, for_good=False)
        merge.merge_layers(self.model, names, self._were_trainable, safe=safe_merge, keep_base=keep_base)

    def unmerge_adapter(self) -> None:
        """Put the base model's original parameters back, the same objects.

        Raises:
            MergeError: They were not kept; nothing was changed.
        """
        merge.unmerge_layers(self.model)

    def unload(self) -> nn.Module:
        """Take all adapters out and return the base model as it was, also in what trains."""
        refuse_sharded(self.model, "no layer can be taken out of it")
        with Journal():  # the two calls write their notes into this one, so that both are undone
            self.unmerge_adapter()
            return self._take_apart(keep=False)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        dequantize: bool = False,
    ) -> nn.Module:
        """Fold adapters into the base model for good and return it, without any adapter layers.

        Nothing of the original parameters is kept, so this needs no memory beyond one layer's and another copy of the
        quantised weights. These are quantised again, which rounds them, or with `dequantize` are no longer quantised.

        Args:
            progressbar: Show progress.
            safe_merge: Refuse, with nothing changed, if a result holds NaN or infinities.
            adapter_names: Which; the active ones if not given.
            dequantize: Replace the quantised layers that have adapters, so that nothing is rounded and warned of.

        Raises:
            UnknownAdapterError: There is no such adapter.
            MergeError: An adapter cannot be merged; nothing was changed.
        """
        names = self._to_merge(adapter_names, for_good=True)
        trainable = self._were_trainable
        merge.merge_for_good(
            self.model, names, trainable, safe=safe_merge, progressbar=progressbar, dequantize=dequantize
        )
        return self._take_apart(keep=True)

    def _to_merge(self, adapter_names: object, *, for_good: bool) -> list[str]:
        refuse_sharded(self.model, "no adapter can be merged: each process has a part of a weight only")
        names: object = self.active_adapters if adapter_names is None else adapter_names
        if isinstance(names, str):
            msg = f"adapter_names is a list of names; it is the text {names!r}. Pass [{names!r}]."
            raise ArgumentError(msg)
        wanted: list[str] = list(names)  # type: ignore[call-overload]
        self.check_known(wanted)
        self.biases.check_merge(wanted, for_good=for_good)
        if not wanted:
            warnings.warn(MergeWarning("No adapter is active, so nothing is merged."), stacklevel=3)
        return wanted

    def _give_up_biases(self, journal: Journal, *, keep: bool) -> None:
        """Train no biases any more; nothing may be merged, unless the trained values are to stay in place."""
        self.biases.note(journal)
        if not keep:
            self.biases.show(trained=False)
        self._set_beside(self.biases.name, trains=False)
        self.biases = Biases()

    def _take_apart(self, *, keep: bool) -> nn.Module:
        """Take all adapters out; keep trained biases and repeated layers, or put back what the base model had."""
        with Journal() as journal:
            journal.note_module(self.model)
            journal.note_module(self)
            self._give_up_biases(journal, keep=keep)
            journal.note_flags(self._were_trainable)
            merge.unwrap(self.model, journal)
            set_fast_paths(self.model, journal, disabled=self.disabled)
            if not keep:
                self.replication.undo(journal)
            self._leave(journal)
            for parameter in self._were_trainable:
                parameter.requires_grad_()
            self.peft_config, self.active_adapter = {}, []
            self.parts.clear()
            withdraw(self, {})
        return self.model

    def _leave(self, journal: Journal) -> None:
        """Take from the base model what it holds of this tuner beside the layers."""
        self.replication = Replication()
        for name in ("peft_config", REPLICATION):
            self.model.__dict__.pop(name, None)
        for module, _ in self.hooks:
            journal.note_module(module)
        remove_hooks(self.hooks)
        self.hooks = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether an adapter can be turned into a low-rank one on all its layers."""
        layers = [layer for layer in self.layers() if layer.targeted and layer.holds(adapter_name)]
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    # nn.Module

    def train(self, mode: bool = True) -> Self:
        """Set training mode, for the model-wide parts too, which stand outside the module tree."""
        self.training = mode
        set_modes((*self.parts.values(), *self._modules.values()), mode)
        return self


def _parameter_of(layer: BaseTunerLayer) -> str | None:
    return layer.parameter_name if isinstance(layer, AdaptedLayer) else None
