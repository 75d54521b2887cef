from __future__ import annotations

from torch import nn

from tunerkit import BaseTunerLayer
from tunerkit.checkpoint.base_model import base_modules, file_path
from tunerkit.embeddings import embeddings_to_load


class Written(nn.Module, BaseTunerLayer):
    """A layer written by hand, whose base layer has a name of its own."""

    base_name = "inner"
    adapter_layer_names = ("hand_A",)

    def __init__(self, inner, *names):
        super().__init__()
        self.inner = inner
        self.hand_A = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})


class Replacing(Written):
    """One whose adapters stand in for the base layer."""

    replaces = True


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = Written(nn.Embedding(3, 2), "a")
        self.inner = Written(Written(nn.Linear(2, 2), "a"), "a", "b")
        self.my_base_layer = Written(nn.Sequential(Written(nn.Linear(2, 2), "b")), "a")

    def get_input_embeddings(self):
        return self.base_layer


def paths(name):
    return [(path, place) for path, module, place in base_modules(Model(), name) if path]


def test_paths_hold_the_layers_of_the_adapter_and_places_do_not_end_in_them():
    assert paths("a") == [
        ("base_layer.inner", "base_layer"),
        ("inner.inner.inner", "inner"),
        ("my_base_layer.inner", "my_base_layer"),
        ("my_base_layer.inner.0", "my_base_layer.inner.0"),
    ]
    assert paths("b") == [
        ("base_layer", "base_layer"),
        ("inner.inner", "inner"),
        ("my_base_layer", "my_base_layer"),
        ("my_base_layer.0.inner", "my_base_layer.0"),
    ]


def test_what_an_adapter_stands_in_for_is_none_of_its_base():
    model = nn.ModuleDict({"head": Replacing(nn.Linear(2, 2), "a"), "body": nn.Linear(2, 2)})
    modules = {name: [path for path, _, _ in base_modules(model, name) if path] for name in ("a", "b")}
    assert modules == {"a": ["body"], "b": ["head", "body"]}


def test_embeddings_are_looked_for_under_both_of_their_keys():
    model = Model()
    assert [piece.path for piece in embeddings_to_load(model, "a", "p.")] == ["p.base_layer.inner", "p.base_layer"]
    assert [piece.path for piece in embeddings_to_load(model, "b", "p.")] == ["p.base_layer", "p.base_layer.base_layer"]


def test_keys_are_those_of_a_model_that_is_not_compiled():
    assert file_path("a._orig_mod.b", "base_model.model.") == "base_model.model.a.b"
    assert file_path("my_orig_mod.b", "base_model.model.") == "base_model.model.my_orig_mod.b"
