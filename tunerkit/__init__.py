"""Parameter-efficient fine-tuning in which every method is a package of its own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tunerkit.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from tunerkit.base_state import get_base_model_state_dict, set_base_model_state_dict
from tunerkit.checkpoint.report import LoadReport
from tunerkit.config import PeftConfig, PeftType, TaskType, check_if_peft_model, get_peft_config
from tunerkit.copied_module import ModulesToSaveWrapper
from tunerkit.errors import NoMatchingPeftModuleError, PeftError, PeftWarning, TunerkitError, TunerkitWarning
from tunerkit.functional import (
    cast_adapter_dtype,
    delete_adapter,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_adapter,
    set_peft_model_state_dict,
    set_requires_grad,
    use_adapter,
    use_rows,
)
from tunerkit.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from tunerkit.layer import BaseTunerLayer
from tunerkit.mappings import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tunerkit.model import PeftMixedModel, PeftModel, get_peft_model
from tunerkit.plan import Plan
from tunerkit.plugins import register
from tunerkit.plugins.hooks import hookimpl
from tunerkit.plugins.method import Method
from tunerkit.preparation import cast_mixed_precision_params, prepare_model_for_kbit_training
from tunerkit.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from tunerkit.task_models import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from tunerkit.tuner import BaseTuner, plan

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BaseTuner",
    "BaseTunerLayer",
    "LoadReport",
    "Method",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "Plan",
    "TaskType",
    "TunerLayerStatus",
    "TunerModelStatus",
    "TunerkitError",
    "TunerkitWarning",
    "cast_adapter_dtype",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "delete_adapter",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hookimpl",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "plan",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "register",
    "set_adapter",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "set_requires_grad",
    "use_adapter",
    "use_rows",
]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """Return the version, which is looked up when it is first asked for; say what to do about other names."""
        if name == "__version__":
            from importlib.metadata import version  # noqa: PLC0415 - slow, and seldom needed

            return version("tunerkit")
        # Of an AttributeError, `from tunerkit import Name` would keep nothing of the text.
        imported = name[0].isupper() and sys._getframe(1).f_code.co_name == "_handle_fromlist"
        raise (ImportError if imported else AttributeError)(_missing(name))


def _missing(name: str) -> str:
    from tunerkit.naming import closest, listing, module_name  # noqa: PLC0415 - for this message alone
    from tunerkit.plugins import method_ids  # noqa: PLC0415 - the same

    missing = f"tunerkit has no {name!r}."
    account = "docs/differences.md lists what PEFT has and this version has not."
    what = next((what for end, what in (("Config", "config"), ("Model", "model class")) if name.endswith(end)), None)
    if what is not None:
        modules = ", ".join(map(module_name, method_ids())) or "none"
        package = (
            f"A method's {what} comes from its package, `from tunerkit_<method> import ...` (installed: {modules})."
        )
        return f"{missing} {package} {account}"
    near = closest(name, __all__)
    return f"{missing} Closest: {listing(near)}. {account}" if near else f"{missing} {account}"
