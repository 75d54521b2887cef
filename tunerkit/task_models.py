"""`PeftModelForCausalLM` and the other classes that PEFT has for tasks.

Which one a model becomes follows from its first adapter's `task_type`. A class may name the heads that models have for
its task; every adapter then has copies of these, which train and are saved with it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from tunerkit.config import TaskType
from tunerkit.model import PeftModel
from tunerkit.targeting import HEADS


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    """A model that sorts whole texts; every adapter has its own head, `classifier` or `score`."""

    heads: ClassVar[tuple[str, ...]] = HEADS["SEQ_CLS"]


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    """A model that sorts the tokens of a text; every adapter has its own head, `classifier` or `score`."""

    heads: ClassVar[tuple[str, ...]] = HEADS["TOKEN_CLS"]


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
    """A model that finds answers in a text; every adapter has its own head, `qa_outputs`."""

    heads: ClassVar[tuple[str, ...]] = HEADS["QUESTION_ANS"]


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """A model whose hidden states are what is wanted."""


class _Generating(PeftModel):
    """A model that writes text."""

    @property
    def generation_config(self) -> Any:
        """The base model's settings for `generate`; to set them sets the base model's."""
        return self.get_base_model().generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.get_base_model().generation_config = value


class PeftModelForCausalLM(_Generating, task=TaskType.CAUSAL_LM):
    """A model that continues a text."""


class PeftModelForSeq2SeqLM(_Generating, task=TaskType.SEQ_2_SEQ_LM):
    """A model that turns one text into another."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING = PeftModel.tasks
"""The classes by task, as in PEFT."""
