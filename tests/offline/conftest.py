"""Small models as folders, and adapters for them."""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from merged_folders import move
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from tunerkit import get_peft_model
from tunerkit.errors import TyingWarning

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        # Adapters for one side of a tie are what is merged here.
        warnings.simplefilter("ignore", TyingWarning)
        yield


@pytest.fixture
def llama():
    """Make a language model, always the same."""

    def make(*, tied=False, dtype=torch.float32):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=tied, **SIZES)
        return LlamaForCausalLM(config).to(dtype).eval()

    return make


@pytest.fixture
def bert_config():
    return BertConfig(vocab_size=64, max_position_embeddings=32, **SIZES)


@pytest.fixture
def ids():
    return torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path):
    """Save a model as a folder."""

    def save(model, name="base", **options):
        model.save_pretrained(tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def adapted(tmp_path, ids):
    """Put a moved adapter onto a model, save it, and return its folder and the model's output with it."""

    def adapt(model, config, name="adapter", *, embeddings=False):
        torch.manual_seed(3)
        with torch.no_grad():
            before = model(input_ids=ids)[0]
            peft = get_peft_model(model, config).eval()
            move(peft)
            after = peft(input_ids=ids)[0]
        peft.save_pretrained(tmp_path / name, save_embedding_layers=embeddings)
        assert (before - after).abs().max() > 1e-3
        return tmp_path / name, peft

    return adapt
