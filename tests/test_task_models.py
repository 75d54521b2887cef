"""The classes for tasks, on models of plain torch."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, ModulesToSaveWrapper, PeftModel, TaskType, get_peft_model
from tunerkit.errors import TargetWarning
from tunerkit.stored_model import StoredModel
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig


class Classifier(nn.Module):
    def __init__(self, head="classifier"):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.add_module(head, nn.Linear(4, 3))
        self.generation_config = "slowly"

    def forward(self, x):
        return list(self.children())[-1](self.lin(x))


def lora(task=None, **settings):
    return LoraConfig(target_modules=["lin"], task_type=task, **settings)


@pytest.mark.parametrize("task", TaskType)
def test_class_follows_from_the_task(task, tmp_path):
    heads = {"QUESTION_ANS": "qa_outputs", "TOKEN_CLS": "score"}
    model = get_peft_model(Classifier(heads.get(task.value, "classifier")), lora(task))
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    assert type(model) is kind is getattr(tunerkit, kind.__name__)
    model.save_pretrained(tmp_path)
    base = Classifier(heads.get(task.value, "classifier"))
    assert type(PeftModel.from_pretrained(base, tmp_path)) is kind


def test_no_task_is_the_class_that_was_called(tmp_path):
    assert type(get_peft_model(Classifier(), lora())) is PeftModel
    model = tunerkit.PeftModelForSequenceClassification(Classifier(), lora())
    assert model.modules_to_save == {"classifier", "score"}
    model.save_pretrained(tmp_path)
    again = tunerkit.PeftModelForSequenceClassification.from_pretrained(Classifier(), tmp_path)
    assert type(again) is tunerkit.PeftModelForSequenceClassification
    assert type(PeftModel.from_pretrained(Classifier(), tmp_path)) is PeftModel


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["classifier", "score"]),
        (["lin"], ["lin", "classifier", "score"]),
        (["score", "norm", "norm"], ["score", "norm", "classifier"]),
    ],
)
def test_heads_are_added_to_a_copy_of_the_config(given, expected):
    config = LoraConfig(target_modules=["body"], task_type="SEQ_CLS", modules_to_save=given)
    base = Classifier()
    base.body = nn.Linear(4, 4)
    base.norm = nn.LayerNorm(4)
    model = get_peft_model(base, config)
    assert model.peft_config["default"].modules_to_save == expected
    assert config.modules_to_save == given


def test_every_adapter_has_its_head():
    model = get_peft_model(Classifier(), lora("TOKEN_CLS"))
    model.add_adapter("b", IA3Config(target_modules=["lin"], feedforward_modules=[]))
    head = model.get_base_model().classifier
    assert isinstance(head, ModulesToSaveWrapper)
    assert head.available_adapters == ["b", "default"]


def test_method_whose_config_has_no_such_setting(monkeypatch):
    model = get_peft_model(Classifier(), lora("SEQ_CLS"))
    config = tunerkit.PeftConfig(task_type="SEQ_CLS")
    assert model._with_heads(config) is config


def test_model_without_any_of_the_heads_warns():
    with pytest.warns(TargetWarning) as caught:
        get_peft_model(Classifier("top"), lora("SEQ_CLS"))
    assert [str(one.message).partition(" matches")[0] for one in caught] == [
        "'classifier' in modules_to_save",
        "'score' in modules_to_save",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(Classifier("score"), lora("SEQ_CLS"))


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_settings_for_generation_are_the_base_models(task):
    model = get_peft_model(Classifier(), lora(task))
    assert model.generation_config == "slowly"
    model.generation_config = "fast"
    assert model.get_base_model().generation_config == "fast"


def test_class_of_somebody_elses_for_a_task(monkeypatch):
    monkeypatch.setattr(StoredModel, "tasks", dict(StoredModel.tasks))

    class PeftModelForSorting(PeftModel, task="FEATURE_EXTRACTION"):
        heads = ("classifier",)

    model = get_peft_model(Classifier(), lora("FEATURE_EXTRACTION"))
    assert type(model) is PeftModelForSorting
    assert model.modules_to_save == {"classifier"}
    assert model(torch.ones(2, 4)).shape == (2, 3)
