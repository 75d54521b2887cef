from __future__ import annotations

import pytest

from tunerkit.offline.keys import Owner, by_number, owner_of, owners_of

ENTRIES = {"toy_A", "toy_B", "toy_vector"}


@pytest.mark.parametrize("entries", [ENTRIES, ()])
@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("base_model.model.layers.0.q.toy_A.weight", Owner("layers.0.q", "toy_A")),
        ("base_model.model.layers.0.q.toy_vector", Owner("layers.0.q", "toy_vector")),
        ("layers.0.q.toy_B.bias", Owner("layers.0.q", "toy_B")),
        ("base_model.model._orig_mod.q._orig_mod.toy_A.weight", Owner("q", "toy_A")),
        ("base_model.toy_A", Owner("", "toy_A")),
    ],
)
def test_tensors_of_an_adapter(key, owner, entries):
    assert owner_of(key, entries) == owner


@pytest.mark.parametrize(
    ("below", "path"),
    [
        ("experts.toy_A", "experts"),
        ("experts.base_layer.toy_A", "experts"),
        ("experts.base_layer.base_layer.toy_A", "experts"),
        ("experts.base_layer.base_layer.base_layer.gate.toy_A", "experts.gate"),
        ("block.base_layer.toy_A", "block.base_layer"),
        ("block.base_layer.base_layer.inner.toy_A", "block.base_layer.inner"),
        ("lin.toy_A", "lin"),
        ("lin.base_layer.base_layer.toy_A", "lin.base_layer"),
        ("base_layer.toy_A", "base_layer"),
        ("my_base_layer.base_layer_norm.toy_A", "my_base_layer.base_layer_norm"),
    ],
)
def test_layers_that_stand_on_others_and_modules_that_are_called_as_what_these_hold(below, path):
    others = ["experts.toy_A", "experts.base_layer.toy_A", "experts.base_layer.base_layer.toy_A"]
    others += ["block.base_layer.toy_A", "lin.toy_A"]
    keys = [f"base_model.model.{key}" for key in (*others, below)]
    assert owners_of(keys, None)[keys[-1]] == Owner(path, "toy_A")


def test_tensors_of_the_base_model():
    key = "base_model.model.model.classifier.weight"
    whole = Owner("model.classifier", "weight", replaces=True)
    assert owner_of(key, ENTRIES) == whole
    assert owner_of(key, (), ["classifier"]) == whole
    assert owner_of("base_model.model.score", ()) == Owner("", "score", replaces=True)
    # Without either, the last name could be that of an entry.
    assert owner_of(key, ()) == Owner("model", "classifier")


def test_what_the_whole_model_shares_is_not_one_of_its_tensors():
    assert owner_of("base_model.something", ENTRIES) == Owner("", "something")


def test_numbers():
    assert by_number("layers.10.q2.3") == "layers.*.q2.*"
