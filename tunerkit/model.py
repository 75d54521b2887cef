"""`PeftModel`: what a user holds."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from tunerkit import refusals, status
from tunerkit.config import check_config
from tunerkit.generation import repeats_in_generate
from tunerkit.saved import name_or_path
from tunerkit.stored_model import StoredModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn

    from tunerkit.config import PeftConfig


class PeftModel(StoredModel):
    """A base model with adapters, with PEFT's calls.

    Args:
        model: The base model. Its layers are replaced in place.
        peft_config: The first adapter's config.
        adapter_name: Its name.
        autocast_adapter_dtype: Make the adapter's tensors float32 where the base is of lower precision.
        low_cpu_mem_usage: Make the adapter's tensors on the meta device, to be filled by a checkpoint.

    Attributes:
        base_model: The tuner around the base model, which is `base_model.model`.

    Raises:
        TunerkitError: The adapter cannot be put in; the model is as it was.
    """

    # What is here

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in the order in which they stand on one another."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter, or the names if there are several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the first active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> str | None:
        """The type of the first active adapter's method."""
        return self.active_peft_config.peft_type

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether a call of the model runs with any adapter: one is active and they are not switched off."""
        return bool(self.active_adapters) and not self.base_model.disabled

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The dtype that the base model says it has, or None if it says none."""
        return getattr(self.get_base_model(), "dtype", None)

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """Return what every layer says of its adapters; see `tunerkit.get_layer_status`."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """Return what the layers together say of their adapters; see `tunerkit.get_model_status`."""
        return status.get_model_status(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many parameters train, and how many there are."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train."""
        trained, total = self.get_nb_trainable_parameters()
        share = 100 * trained / total if total else 0.0
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}")  # noqa: T201

    # Adapters

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out; see `BaseTuner.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active and trainable and freeze the others; see `BaseTuner.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def use_adapter(self, adapter_name: str | Sequence[str]) -> contextlib.AbstractContextManager[None]:
        """Within the block, calls of the model in this thread use these adapters; see `BaseTuner.use_adapter`."""
        return self.base_model.use_adapter(adapter_name)

    def use_rows(self, adapter_names: Sequence[str], repeats: int = 1) -> contextlib.AbstractContextManager[None]:
        """Within the block, each row of a batch has an adapter of its own; see `BaseTuner.use_rows`."""
        return self.base_model.use_rows(adapter_names, repeats)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the base model, bit for bit; what is merged is taken out and put back."""
        if self.base_model.disabled:
            yield
            return
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.base_model.enable_adapter_layers()

    # Calls

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model with the adapters that are active, or that this call is routed to.

        Args:
            args: The arguments of the base model.
            adapter_names: The adapter of each row of the batch; `"__base__"` is the base model. See `use_rows`.
            kwargs: The arguments of the base model, by name.
        """
        tuner: Any = self._modules["base_model"]  # not by `__getattr__`, which a small forward feels
        return tuner(*args, adapter_names=adapter_names, **refusals.own_arguments(kwargs))

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Call the base model's `generate`, with the adapters that are active or that this call is routed to.

        Args:
            args: The arguments of the base model's `generate`.
            adapter_names: The adapter of each row of the batch; `"__base__"` is the base model. See `use_rows`.
            kwargs: The arguments of the base model's `generate`, by name.
        """
        base: Any = self.get_base_model()
        arguments = refusals.own_arguments(kwargs)
        if adapter_names is None:
            refusals.refuse_around(self.base_model)
        with self.base_model.rows_of_call(adapter_names, args, arguments, repeats_in_generate(base, args, arguments)):
            return base.generate(*args, **arguments)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        try:
            return self.base_model.find_call(name, self.base_model)
        except AttributeError as error:
            if error.name not in (None, name):  # It is there, and what it does fails.
                raise
            raise refusals.MissingAttributeError(self, self.base_model.model, name) from None


PeftMixedModel = PeftModel
"""PEFT's name for a model whose adapters are of different methods, which here any model's may be."""


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Attach a new adapter to a model; what is returned is of the class for the config's `task_type`.

    Args:
        model: The base model. Its layers are replaced in place.
        peft_config: The adapter's config; it is not changed.
        adapter_name: The adapter's name.
        mixed: Accepted for PEFT's sake; adapters of different methods share any model.
        autocast_adapter_dtype: Make the adapter's tensors float32 where the base is of lower precision.
        revision: The revision of the base model, noted in the config.
        low_cpu_mem_usage: Make the adapter's tensors on the meta device, to be filled by a checkpoint.

    Raises:
        TunerkitError: The adapter cannot be put in; the model is as it was.
    """
    del mixed
    refusals.check_model(model, "get_peft_model(model, peft_config)", peft_config)
    config = check_config(peft_config).copy()
    config.base_model_name_or_path = name_or_path(model) or config.base_model_name_or_path
    config.revision = revision if revision is not None else config.revision
    return PeftModel.for_task(config)(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
