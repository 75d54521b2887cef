"""`AutoPeftModel`: an adapter's base model and the adapter, loaded in one call; it needs transformers."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from tunerkit.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME
from tunerkit.checkpoint.folder import is_id
from tunerkit.checkpoint.hub import fetched
from tunerkit.config import PeftConfig
from tunerkit.errors import ArgumentError, CheckpointError, TunerkitError
from tunerkit.keywords import of_download
from tunerkit.model import PeftModel
from tunerkit.naming import listing
from tunerkit.peft_types import AUTO_CLASSES, TaskType

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping
    from pathlib import Path

LIBRARIES = ("diffusers", "lerobot", "megatron-core", "transformers")
"""Of which a checkpoint may name a class as that of its base model, as in PEFT."""

_TOKENIZER = "tokenizer_config.json"


class AutoPeftModel:
    """Loads an adapter together with the base model that its config names.

    Of an adapter with a `task_type`, the base is loaded by transformers' auto class for the task; of one without, it is
    of the class that the config has in `auto_mapping`.

    Attributes:
        task: The task that the adapter must be for; None for any.
    """

    task: ClassVar[TaskType | None] = None

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        name = type(self).__name__
        msg = f"{name} loads models and is none itself. Call {name}.from_pretrained(folder)."
        raise ArgumentError(msg)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model, and put the adapter into it.

        If there is a tokenizer beside the adapter with more tokens than the base has embeddings, the base gets as many.

        Args:
            pretrained_model_name_or_path: The adapter's folder, or its id on the hub.
            adapter_name: The name that the adapter gets.
            is_trainable: Make it trainable; otherwise it is frozen and the model is set to evaluation.
            config: A config to use instead of the checkpoint's.
            revision: That of the adapter, on the hub; the base model's revision is in the config.
            import_allowlist: The libraries of which the checkpoint may name a class; `LIBRARIES` if not given.
            kwargs: What `PeftModel.from_pretrained` takes by its names; all else goes to the base model's
                `from_pretrained`, such as `dtype` and `device_map`; what a download takes (`token`, `cache_dir`) goes
                to both.

        Returns:
            A model of the class for the adapter's task.

        Raises:
            CheckpointError: The folder is no adapter's, or its config names no base model, or a class that may not be
                imported.
            ArgumentError: The adapter is for another task.
            TunerkitError: The adapter cannot be put in, or transformers is not installed.
        """
        own = {name: kwargs.pop(name) for name in _OWN & kwargs.keys()}
        subfolder = own.pop("subfolder", None)
        hub = of_download(kwargs) | ({"revision": revision} if revision is not None else {})
        source = pretrained_model_name_or_path
        folder = fetched(source, (CONFIG_NAME, WEIGHTS_NAME), subfolder, hub, also=[_TOKENIZER])
        found = config if config is not None else PeftConfig.from_pretrained(folder)
        load = cls._loader(found, folder, LIBRARIES if import_allowlist is None else tuple(import_allowlist))
        base = load(found.base_model_name_or_path, revision=found.revision, **kwargs)
        if (folder / _TOKENIZER).is_file() and hasattr(base, "get_input_embeddings"):
            # On the hub it has more files than this one, of names that it knows itself.
            place = (source, {**hub, "subfolder": subfolder or ""}) if is_id(source) else (folder, {})
            _fit_to_tokenizer(base, *place, kwargs.get("trust_remote_code", False))
        return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable=is_trainable, config=config, **own)

    @classmethod
    def _loader(cls, config: PeftConfig, folder: Path, allowed: tuple[str, ...]) -> Any:
        """Return what loads the base model."""
        if cls.task is not None and config.task_type not in (None, cls.task):
            right = f"AutoPeftModelFor{PeftModel.for_task(config).__name__.removeprefix('PeftModelFor')}"
            msg = (
                f"{cls.__name__} loads adapters for {cls.task}, and the one in '{folder}' is for {config.task_type}. "
                f"Use {right}, or AutoPeftModel for any."
            )
            raise ArgumentError(msg)
        if not config.base_model_name_or_path:
            msg = (
                f"The config in '{folder}' does not say which base model the adapter is for (base_model_name_or_path). "
                "Load that model, and call PeftModel.from_pretrained(model, folder)."
            )
            raise CheckpointError(msg)
        task = cls.task if config.task_type is None and not config.auto_mapping else config.task_type
        if task is not None:
            return getattr(_transformers(), AUTO_CLASSES[str(task)]).from_pretrained
        return _named_class(config.auto_mapping or {}, folder, allowed).from_pretrained


def _named_class(mapping: dict[str, Any], folder: Path, allowed: tuple[str, ...]) -> Any:
    """Return the class of the base model that a config names, if it may be imported."""
    name, library = mapping.get("base_model_class"), mapping.get("parent_library")
    if not (isinstance(name, str) and isinstance(library, str)):
        _refuse(f"names no task and no class of its base model ({mapping!r})", folder)
    if not any(library == one or library.startswith(f"{one}.") for one in allowed):
        msg = (
            f"The config in '{folder}' wants to import {library!r} for its base model, which may run any code. Allowed "
            f"are {listing(allowed)}. If you trust it, pass import_allowlist=[{library!r}]."
        )
        raise CheckpointError(msg)
    try:
        return getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError) as error:
        _refuse(f"says that its base model is of the class {library}.{name}, which is not here ({error})", folder)


def _refuse(what: str, folder: Path) -> NoReturn:
    msg = f"The config in '{folder}' {what}. Load the base model, and call PeftModel.from_pretrained(model, folder)."
    raise CheckpointError(msg)


def _transformers() -> Any:
    try:
        import transformers  # noqa: PLC0415 - an extra, and slow
    except ModuleNotFoundError as error:
        msg = "AutoPeftModel needs transformers, which is not installed: pip install 'tunerkit[transformers]'"
        raise TunerkitError(msg) from error
    return transformers


def _fit_to_tokenizer(
    base: Any, source: str | os.PathLike[str], given: Mapping[str, Any], trust_remote_code: bool
) -> None:
    """Give a model as many embeddings as the tokenizer beside the adapter has tokens, if it has fewer."""
    tokenizer = _transformers().AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **given)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


_OWN = inspect.signature(PeftModel.from_pretrained).parameters.keys() - {
    "model",
    "model_id",
    "adapter_name",
    "is_trainable",
    "config",
    "kwargs",
}
"""The arguments that the adapter is loaded with."""


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Loads an adapter for a model that continues a text, with that model."""

    task: ClassVar[TaskType | None] = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Loads an adapter for a model that turns one text into another, with that model."""

    task: ClassVar[TaskType | None] = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Loads an adapter for a model that sorts whole texts, with that model."""

    task: ClassVar[TaskType | None] = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Loads an adapter for a model that sorts the tokens of a text, with that model."""

    task: ClassVar[TaskType | None] = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Loads an adapter for a model that finds answers in a text, with that model."""

    task: ClassVar[TaskType | None] = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Loads an adapter for a model whose hidden states are what is wanted, with that model."""

    task: ClassVar[TaskType | None] = TaskType.FEATURE_EXTRACTION
