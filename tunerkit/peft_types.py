"""`PeftType` and `TaskType`: the types of methods, which are those installed, and what models are used for."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from tunerkit.naming import listing, peft_type_name

if TYPE_CHECKING:
    from collections.abc import Iterator


class TaskType(str, enum.Enum):
    """What a model is used for, with PEFT's names.

    Attributes:
        SEQ_CLS: Sorting whole texts; the head is trained too.
        SEQ_2_SEQ_LM: Turning one text into another.
        CAUSAL_LM: Continuing a text.
        TOKEN_CLS: Sorting the tokens of a text; the head is trained too.
        QUESTION_ANS: Finding answers in a text; the head is trained too.
        FEATURE_EXTRACTION: Using the hidden states.
    """

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"  # noqa: S105 - a task, no password
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    def __str__(self) -> str:
        return self.value


AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""By which of its classes transformers loads a model for a task."""


class _InstalledTypes(type):
    """Finds `PeftType.X` among the methods that are installed, because there is no closed list of them."""

    def __getattr__(cls, name: str) -> PeftType:
        if name.startswith("_"):
            raise AttributeError(name)
        known = {kind.value: kind for kind in cls}
        if name not in known:
            msg = f"No installed package offers a method of the type {name!r}; installed are {listing(known)}."
            raise AttributeError(msg)
        return known[name]

    def __iter__(cls) -> Iterator[PeftType]:
        from tunerkit.plugins import method_ids  # noqa: PLC0415 - the plugins' room is above this one

        return iter([PeftType(peft_type_name(method)) for method in method_ids()])

    def __dir__(cls) -> list[str]:
        return [*super().__dir__(), *(kind.value for kind in cls)]


class PeftType(str, metaclass=_InstalledTypes):
    """The type of a method as it stands in a checkpoint, such as `PeftType.LORA`; equal to its text."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The type as text."""
        return str(self)

    @property
    def name(self) -> str:
        """The type as text, as an enum's member has it."""
        return str(self)

    def __repr__(self) -> str:
        return f"<PeftType.{self}>"
