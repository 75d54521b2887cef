"""`StoredModel`: putting adapters into a model, from a config or from files."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from tunerkit import refusals
from tunerkit.config import check_config
from tunerkit.errors import AdapterNameError
from tunerkit.evaluation import set_to_evaluation
from tunerkit.journal import Journal
from tunerkit.keywords import check_loading, of_download
from tunerkit.names import RESERVED_NAMES
from tunerkit.naming import check_adapter_name, listing
from tunerkit.plugins import get_method
from tunerkit.preparation import add_input_hooks, checkpoints_gradients
from tunerkit.savable_model import SavableModel
from tunerkit.saved import SavedAdapter, refuse_offload
from tunerkit.tuner import BaseTuner

if TYPE_CHECKING:
    import os

    import torch
    from torch import nn
    from typing_extensions import Self

    from tunerkit.checkpoint.report import LoadReport
    from tunerkit.config import PeftConfig


class StoredModel(SavableModel):
    """A base model with adapters that come from a config or from files, and go into files; `PeftModel` is one.

    A subclass for a task is declared with `class PeftModelForX(PeftModel, task="X")`, and its task then calls for it.

    Attributes:
        heads: The modules that every adapter of such a model trains and saves as a whole, beside its config's own.
        tasks: The subclasses by the task that they are for.
    """

    heads: ClassVar[tuple[str, ...]] = ()
    tasks: ClassVar[dict[str, type[StoredModel]]] = {}

    def __init_subclass__(cls, task: str | None = None, **kwargs: Any) -> None:
        """Note for which task the class is."""
        super().__init_subclass__(**kwargs)
        if task is not None:
            cls.tasks[str(task)] = cls

    @classmethod
    def for_task(cls, config: PeftConfig) -> type[Self]:
        """Return the class for the task of a config; it is this one if the config has none."""
        return cls.tasks.get(str(config.task_type), cls)  # type: ignore[return-value]

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        from tunerkit.integrations import introduce  # noqa: PLC0415 - for those who have such a model alone

        super().__init__()
        introduce(StoredModel)
        refusals.check_model(model, "PeftModel(model, peft_config)", peft_config)
        if isinstance(model, StoredModel):
            msg = (
                f"The model is a PeftModel already, with the adapters {listing(model.peft_config)}. Call "
                "add_adapter(name, config) on it, or pass model.unload() to start anew."
            )
            raise AdapterNameError(msg)
        refusals.refuse_adapted(model)
        peft_config = self._with_heads(check_config(peft_config))
        kind = get_method(str(peft_config.peft_type)).method.tuner or BaseTuner
        with Journal():
            make = functools.partial(kind, model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
            if kind.__init__ is BaseTuner.__init__:
                tuner = make(autocast_adapter_dtype=autocast_adapter_dtype)
            else:  # one with PEFT's arguments
                tuner = make()
                tuner._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            self.base_model = tuner
            self.training = tuner.training
            self._prepare_if_checkpointed()

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of the modules that adapters train and save as a whole; None if there are none."""
        configs = self.peft_config.values()
        return {name for config in configs for name in getattr(config, "modules_to_save", None) or ()} or None

    def _with_heads(self, config: PeftConfig) -> PeftConfig:
        """Return a config that trains and saves the task's heads too, if its method can."""
        if not self.heads or not hasattr(config, "modules_to_save"):
            return config
        completed: Any = config.copy()
        completed.modules_to_save = list(dict.fromkeys([*(completed.modules_to_save or ()), *self.heads]))
        return completed  # type: ignore[no-any-return]

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let gradients flow through checkpointed blocks; see `tunerkit.preparation`. Done at attaching if they are."""
        self.base_model.hooks += add_input_hooks(model)

    def _prepare_if_checkpointed(self) -> None:
        model = self.get_base_model()
        if checkpoints_gradients(model):
            self.prepare_model_for_gradient_checkpointing(model)

    _prepare_model_for_gradient_checkpointing = prepare_model_for_gradient_checkpointing

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put in another adapter, of the same method or another; it is not active yet.

        Args:
            adapter_name: Its name.
            peft_config: Its config.
            low_cpu_mem_usage: Make its tensors on the meta device, to be filled by a checkpoint.
            autocast_adapter_dtype: Make its tensors float32 where the base is of lower precision.

        Raises:
            AdapterNameError: The name is illegal or taken.
            TunerkitError: The adapter cannot be put in; the model is as it was.
        """
        tuner = self.base_model
        if check_adapter_name(adapter_name, RESERVED_NAMES) in tuner.peft_config:
            msg = (
                f"There is an adapter {adapter_name!r} already (of {listing(tuner.peft_config)}). Choose another name, "
                "or take it out first with delete_adapter()."
            )
            raise AdapterNameError(msg)
        with Journal() as journal:
            journal.note_module(tuner)
            first = not tuner.peft_config
            tuner.peft_config[adapter_name] = self._with_heads(check_config(peft_config))
            tuner.inject_adapter(
                tuner.model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            if first:
                self._prepare_if_checkpointed()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        subfolder: str | None = None,
        torch_device: str | torch.device | None = None,
        strict: bool = True,
        verify: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Attach an adapter that was saved, to a model of the class for its task.

        Args:
            model: The base model.
            model_id: The checkpoint's folder, or its id on the hub.
            adapter_name: The name the adapter gets.
            is_trainable: Make it trainable; otherwise it is frozen and the model is set to evaluation.
            config: A config to use instead of the checkpoint's.
            autocast_adapter_dtype: Make its tensors float32 where the base is of lower precision.
            ephemeral_gpu_offload: Not supported.
            low_cpu_mem_usage: Make no initial tensors, also if not `strict`; a strict load never does.
            key_mapping: See `load_peft_weights`.
            subfolder: A folder below `model_id`, for adapters that were saved beside others.
            torch_device: Where the checkpoint's tensors are read to; the CPU if not given.
            strict: Refuse a checkpoint with missing or unexpected tensors rather than warn.
            verify: Refuse an adapter that changes nothing; see `tunerkit.effect`.
            kwargs: What a download takes (`revision`, `token`, `cache_dir`), and what else PEFT does; see
                `tunerkit.keywords`.

        Raises:
            KeywordError: A keyword argument is unknown, or asks for what is not done here.
            CheckpointError: The checkpoint is not there, broken, or does not fit; the model is as it was.
            NoEffectError: The adapter changes nothing, and `verify` is set; the model is as it was.
            TunerkitError: The adapter cannot be put in; the model is as it was.
        """
        if isinstance(model, StoredModel):
            msg = "The model is a PeftModel already. Call load_adapter(model_id, adapter_name) on it."
            raise AdapterNameError(msg)
        refusals.check_model(model, "PeftModel.from_pretrained(model, model_id)", model_id)
        check_loading("from_pretrained", kwargs, inspect.signature(cls.from_pretrained).parameters)
        if key_mapping is None:  # where transformers has renamed modules since
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        saved = SavedAdapter(
            model_id,
            subfolder,
            config,
            is_trainable=is_trainable,
            device=torch_device,
            key_mapping=key_mapping,
            download=of_download(kwargs),
        )
        refuse_offload(ephemeral_gpu_offload)
        with Journal() as journal:
            # What is not strict may leave tensors with the values they start with, so these must be real.
            meta = strict or low_cpu_mem_usage
            kind = cls.for_task(saved.config)
            loaded = kind(model, saved.config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage=meta)
            saved.put_into(loaded, adapter_name, strict=strict, verify=verify)
            if not is_trainable:
                set_to_evaluation(loaded, loaded.base_model.parts.values(), journal)
        return loaded

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        subfolder: str | None = None,
        config: PeftConfig | None = None,
        strict: bool = True,
        verify: bool = False,
        **kwargs: Any,
    ) -> LoadReport:
        """Add an adapter that was saved, of any method; it is not active yet.

        If the name is taken, only the tensors are loaded, into the adapter that has it.

        Args:
            model_id: The checkpoint's folder, or its id on the hub.
            adapter_name: The name the adapter gets.
            is_trainable: Let it train when it is made active; otherwise the model is set to evaluation.
            torch_device: Where the checkpoint's tensors are read to; the CPU if not given.
            autocast_adapter_dtype: Make its tensors float32 where the base is of lower precision.
            ephemeral_gpu_offload: Not supported.
            low_cpu_mem_usage: Make no initial tensors, also if not `strict`; a strict load never does.
            key_mapping: See `load_peft_weights`.
            subfolder: A folder below `model_id`, for adapters that were saved beside others.
            config: A config to use instead of the checkpoint's.
            strict: Refuse a checkpoint with missing or unexpected tensors rather than warn.
            verify: Refuse an adapter that changes nothing; see `tunerkit.effect`.
            kwargs: What a download takes (`revision`, `token`, `cache_dir`), and what else PEFT does; see
                `tunerkit.keywords`.

        Returns:
            Which tensors found their place.

        Raises:
            KeywordError: A keyword argument is unknown, or asks for what is not done here.
            CheckpointError: The checkpoint is not there, broken, or does not fit; the model is as it was.
            NoEffectError: The adapter changes nothing, and `verify` is set; the model is as it was.
            TunerkitError: The adapter cannot be put in; the model is as it was.
        """
        check_loading("load_adapter", kwargs, inspect.signature(self.load_adapter).parameters)
        refuse_offload(ephemeral_gpu_offload)
        saved = SavedAdapter(
            model_id,
            subfolder,
            config,
            is_trainable=is_trainable,
            device=torch_device,
            key_mapping=key_mapping,
            download=of_download(kwargs),
        )
        with Journal() as journal:
            if check_adapter_name(adapter_name, RESERVED_NAMES) not in self.peft_config:
                meta = strict or low_cpu_mem_usage
                self.add_adapter(
                    adapter_name, saved.config, low_cpu_mem_usage=meta, autocast_adapter_dtype=autocast_adapter_dtype
                )
            else:
                saved.check_same(self.peft_config[adapter_name], adapter_name)
            report = saved.put_into(self, adapter_name, strict=strict, verify=verify)
            if not is_trainable:
                set_to_evaluation(self, self.base_model.parts.values(), journal)
        return report
