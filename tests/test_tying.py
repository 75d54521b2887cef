from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from torch import nn

from tunerkit import get_peft_model, plan, plugins, register
from tunerkit.adapter import Adapter, AdditiveAdapter
from tunerkit.config import PeftConfig
from tunerkit.errors import TyingWarning, UnsupportedSiteError
from tunerkit.plugins.method import Method
from tunerkit.targeting import places_and_bases
from tunerkit.tying import modules_that_share, remarks_on_ties
from tunerkit_lora import LoraConfig


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.embed, self.body = nn.Linear(3, 5), nn.Embedding(5, 3), nn.Linear(3, 3)
        self.head.weight = self.embed.weight
        self.again = self.body

    def forward(self, x):
        return self.head(self.body(self.embed(x)))


def shared_in(model):
    return modules_that_share(*places_and_bases(model))


class TestModulesThatShare:
    def test_the_embedding_comes_first(self):
        model = Model()
        assert [[place[0] for place in group] for group in shared_in(model)] == [["embed", "head"]]

    def test_a_module_at_two_places_shares_nothing(self):
        model = Model()
        model.head.weight = nn.Parameter(torch.zeros(5, 3))
        assert shared_in(model) == []

    @pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
    def test_a_scripted_module_beside(self, tmp_path):
        model = nn.Sequential()
        model.own = nn.Linear(3, 3)
        model.scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Dropout()))
        adapted = get_peft_model(model, LoraConfig(target_modules=["own"], r=2))
        adapted.add_adapter("other", LoraConfig(target_modules=["own"], r=2, init_lora_weights=False))
        adapted.set_adapter("other")
        adapted.eval()
        assert not model.scripted.training
        expected = adapted(torch.ones(1, 3))
        adapted.save_pretrained(tmp_path)
        adapted.train()
        assert model.scripted.training
        adapted.load_adapter(tmp_path / "other", "third")
        assert not model.scripted.training
        adapted.set_adapter("third")
        assert torch.equal(adapted(torch.ones(1, 3)), expected)
        assert torch.allclose(adapted.merge_and_unload()(torch.ones(1, 3)), expected)


class TestRemarks:
    def test_nothing_that_is_changed(self):
        assert remarks_on_ties(shared_in(Model()), [], tied=False) == []
        assert remarks_on_ties([], [], tied=True) == [
            "ensure_weight_tying=True ties nothing: nothing that is adapted or saved shares a weight."
        ]

    def test_what_is_changed(self):
        model = Model()
        shared = shared_in(model)
        assert remarks_on_ties(shared, [id(model.head)], tied=True) == []
        (remark,) = remarks_on_ties(shared, [id(model.head)], tied=False)
        assert remark.startswith("'embed', 'head' share a weight, which training only one of them")


@dataclasses.dataclass
class SharingConfig(PeftConfig):
    peft_type: str | None = "SHARING_TOY"
    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool = False


class SharingAdapter(AdditiveAdapter):
    entries = ("sharing_delta",)
    kinds = frozenset({"linear", "embedding"})

    def __init__(self, site, config):
        super().__init__(site, config)
        self.sharing_delta = nn.Parameter(site.zeros(*site.weight.shape))

    def delta(self, base):
        del base
        return self.sharing_delta

    def tie(self, other):
        self.sharing_delta = other.sharing_delta


class LonelyAdapter(SharingAdapter):
    tie = Adapter.tie


@pytest.fixture
def sharing(request):
    adapter = getattr(request, "param", SharingAdapter)
    register("sharing-toy", types.SimpleNamespace(method=Method(SharingConfig, adapter)))
    yield
    plugins.unregister("sharing-toy")


@pytest.mark.usefixtures("sharing")
class TestTargets:
    def config(self, **settings):
        return SharingConfig(**{"target_modules": ["head", "body"], "ensure_weight_tying": True, **settings})

    def test_what_shares_the_weight_is_adapted_last(self):
        made = plan(Model(), self.config())
        assert [(target.name, target.tied_to) for target in made.targets] == [
            ("body", None),
            ("embed", None),
            ("head", "embed"),
        ]
        assert "shares its weight with 'head'" in str(made)
        assert made.ties == ()

    def test_also_what_is_excluded(self):
        made = plan(Model(), self.config(target_modules=["embed"], exclude_modules=["head"]))
        assert set(made.adapted) == {"embed", "head"}

    def test_without_the_option_nothing_is_added(self):
        made = plan(Model(), self.config(ensure_weight_tying=False))
        assert [target.name for target in made.targets] == ["head", "body"]
        assert made.ties[0] in str(made)

    def test_the_tensor_is_one(self):
        base = Model()
        model = get_peft_model(base, self.config())
        assert base.head.sharing_delta["default"] is base.embed.sharing_delta["default"]
        assert model.get_nb_trainable_parameters()[0] == 15 + 9

    def test_it_is_said_what_comes_apart(self):
        with pytest.warns(TyingWarning, match="'embed', 'head' share a weight"):
            get_peft_model(Model(), self.config(ensure_weight_tying=False))

    @pytest.mark.parametrize("sharing", [LonelyAdapter], indirect=True)
    def test_a_method_that_cannot(self):
        base = Model()
        with pytest.raises(UnsupportedSiteError) as error:
            get_peft_model(base, self.config())
        assert str(error.value) == (
            "Two modules share a weight, and a LonelyAdapter cannot share its tensors with a LonelyAdapter "
            "(ensure_weight_tying=True). Leave ensure_weight_tying out, or target neither."
        )
        assert type(base.embed) is nn.Embedding
