"""transformers: its `Trainer` asks whether a model is of one of PEFT's classes.

What is changed, in the modules' own names only:

- `_is_peft_model`, in `transformers.trainer_utils` and where it is imported from there, also says yes to tunerkit's
  models. So the trainer looks at the base model for the columns, labels and losses it knows, loads adapters when it
  resumes and at the end of a training, and trains on a quantised base.
- `PeftModel` and `is_peft_available`, in `transformers.trainer`: by them the trainer saves adapters only.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

from tunerkit.errors import IntegrationWarning

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

_ASKS = "_is_peft_model"


def changes(model: type) -> dict[str, Callable[[ModuleType], None]]:
    """Return what to do to modules of transformers once they are imported, by their names.

    Args:
        model: The class of tunerkit's models.
    """
    ask = functools.partial(_answer_for, model)
    return {
        "transformers.trainer_utils": ask,
        "transformers.integrations.neftune": ask,
        "transformers.trainer": functools.partial(_let_save, model),
    }


def _answer_for(model: type, module: ModuleType) -> None:
    """Let a module's question whether a model is PEFT's be answered for tunerkit's too."""
    asked = vars(module).get(_ASKS)
    if asked is None or hasattr(asked, "tunerkit"):
        return

    def is_peft_model(candidate: Any) -> bool:
        return isinstance(candidate, model) or asked(candidate)

    is_peft_model.tunerkit = True  # type: ignore[attr-defined]  # what imported it from there has it already
    setattr(module, _ASKS, is_peft_model)


def _let_save(model: type, module: ModuleType) -> None:
    """Let the trainer save adapters only."""
    _answer_for(model, module)
    if not hasattr(vars(module).get(_ASKS), "tunerkit"):
        warnings.warn(
            IntegrationWarning(
                "transformers.trainer does not ask `_is_peft_model` in this version of transformers, so its Trainer "
                "may take models with adapters for whole models: it would save all weights. Use another version of "
                "transformers, or save with model.save_pretrained."
            ),
            stacklevel=2,
        )
    module.PeftModel = (vars(module).get("PeftModel", ()), model)  # type: ignore[attr-defined]
    module.is_peft_available = lambda: True  # type: ignore[attr-defined]
