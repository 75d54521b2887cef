"""A small training with transformers' `Trainer`, as a script for PEFT has it; run in this process or as a program.

    python training.py FOLDER before|after

runs it where `peft` cannot be imported, with `Trainer` imported before or after the model with adapters is made.
"""

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import torch


class WithoutPeft(PathFinder):
    """Finds what there is but for PEFT."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname == "peft" else super().find_spec(fullname, path, target)


def make_base():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes))


def set_start(model):
    """Give an adapter the same numbers in every library."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def examples():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(64, (32, 12), generator=generator)
    # The last column is one that the model does not take.
    return [{"input_ids": row, "labels": torch.tensor(i % 3), "origin": torch.tensor(i)} for i, row in enumerate(rows)]


def train(model, folder, **settings):
    """Train a model; return the losses, by step, and those of the evaluations."""
    from transformers import Trainer, TrainingArguments

    resume = settings.pop("resume", None)
    chosen = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True}
    arguments = TrainingArguments(
        folder,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{**chosen, **settings},
    )
    trainer = Trainer(model, arguments, train_dataset=examples(), eval_dataset=examples()[:8])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(os.path.join(folder, "final"))  # noqa: PTH118 - as a string, as scripts do
    log = trainer.state.log_history
    return [line["loss"] for line in log if "loss" in line], [line["eval_loss"] for line in log if "eval_loss" in line]


if __name__ == "__main__":
    sys.meta_path[:] = [WithoutPeft if finder is PathFinder else finder for finder in sys.meta_path]
    folder, order = Path(sys.argv[1]), sys.argv[2]
    if order == "before":
        from transformers import Trainer  # noqa: F401 - that it is imported is what is tested
    from tunerkit import get_peft_model
    from tunerkit_lora import LoraConfig

    model = get_peft_model(make_base(), LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    assert ("transformers.trainer" in sys.modules) == (order == "before")
    set_start(model)
    losses = train(model, str(folder / "out"))
    assert "peft" not in sys.modules
    torch.save(losses, folder / "losses.pt")
