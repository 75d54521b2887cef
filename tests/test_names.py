from __future__ import annotations

import copy
import io
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.adapter import Adapter, Part, linear
from tunerkit.errors import AdapterNameError, PluginError
from tunerkit.names import RESERVED_NAMES, EntryModule, PerAdapter, entries_of
from tunerkit.naming import check_adapter_name
from tunerkit.route import Owner
from tunerkit.sites import make_site

KEYS = [
    "0.base_layer.weight",
    "0.base_layer.bias",
    "0.toy_bare.default",
    "0.toy_bare.other",
    "0.toy_kept.default",
    "0.toy_kept.other",
    "0.toy_down.default.weight",
    "0.toy_down.other.weight",
]


class Toy(Adapter):
    """Holds a tensor of every kind: a bare parameter, a child module, a buffer that is saved and one that is not."""

    entries = ("toy_bare", "toy_kept", "toy_scratch", "toy_down")

    def __init__(self, site, config):
        super().__init__(site, config)
        self.scaling = 2.0
        self.toy_bare = nn.Parameter(site.normal(site.out_features, 1))
        self.register_buffer("toy_kept", site.normal(site.out_features))
        self.register_buffer("toy_scratch", site.zeros(1), persistent=False)
        self.toy_down = linear(site.normal(2, site.in_features))

    def forward(self, x, below):
        shift = self.scaling * self.toy_down(x).sum(-1, keepdim=True)
        return below(x) * self.toy_bare[:, 0] + self.toy_kept + self.toy_scratch + shift


class Bare(Adapter):
    entries = ("toy_bare",)

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_bare = nn.Parameter(site.ones(site.out_features, 1))


def layer_of(*names, bias=True):
    layer = AdaptedLayer(make_site(nn.Linear(6, 4, bias=bias), "0"), Owner())
    for name in names:
        layer.add_adapter(name, Toy(layer.bare_site, None), "toy")
    if names:
        layer.set_adapter(names[0])
    return layer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(layer_of("default", "other"), nn.ReLU())


@pytest.fixture
def x():
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def is_legal(name):
    try:
        return check_adapter_name(name, RESERVED_NAMES) == name
    except AdapterNameError:
        return False


def assert_one(layer, name="default"):
    """Assert that the names in the model and the attributes of the adapter mean the same objects."""
    adapter = layer.adapters[name]
    for entry in entries_of(adapter):
        assert layer.get_submodule(entry)[name] is getattr(adapter, entry)
    assert adapter.__dict__["toy_down"] is adapter._modules["toy_down"]


class TestNamesInTheModel:
    def test_state_dict(self, model):
        assert sorted(model.state_dict()) == sorted(KEYS)
        assert sorted(name for name, _ in model.named_parameters()) == sorted(k for k in KEYS if "kept" not in k)
        assert sorted(name for name, _ in model.named_buffers()) == [
            "0.toy_kept.default",
            "0.toy_kept.other",
            "0.toy_scratch.default",
            "0.toy_scratch.other",
        ]

    def test_modules(self, model):
        names = [name for name, _ in model.named_modules()]
        assert "0.toy_down.default" in names
        assert "0.base_layer" in names
        assert len(names) == len(set(names))
        seen = []
        model.apply(seen.append)
        assert sum(type(module) is EntryModule for module in seen) == 4

    def test_what_a_path_means(self, model):
        adapter = model[0].adapters["other"]
        assert model.get_parameter("0.toy_bare.other") is adapter.toy_bare
        assert model.get_parameter("0.toy_down.other.weight") is adapter.toy_down.weight
        assert model.get_submodule("0.toy_down.other") is adapter.toy_down
        assert model.get_buffer("0.toy_kept.other") is adapter.toy_kept
        with pytest.raises(AttributeError):
            model.get_parameter("0.toy_bare.missing")

    def test_the_adapters_are_no_children_of_their_own(self, model):
        assert not any(isinstance(module, Adapter) for module in model.modules())

    def test_repr(self, model):
        assert "default: (4, 1), other: (4, 1)" in repr(model)
        assert "toy_down" in repr(model)
        assert repr(model[0].toy_bare._parameters).startswith("{'default': Parameter")

    def test_mode_of_a_new_adapter(self):
        layer = layer_of("default")
        layer.eval()
        layer.add_adapter("other", Toy(layer.bare_site, None), "toy")
        assert not any(module.training for module in layer.modules())
        assert not layer.adapters["other"].training
        layer.train()
        assert all(module.training for module in (*layer.modules(), *layer.adapters.values()))

    def test_a_first_adapter_in_evaluation(self):
        site = make_site(nn.Linear(6, 4).eval())
        layer = AdaptedLayer(site, Owner())
        layer.add_adapter("default", Toy(site, None), "toy")
        assert not any(module.training for module in layer.modules())


class TestContainers:
    def test_like_a_module_dict(self, model):
        down = model[0].toy_down
        adapter = model[0].adapters["default"]
        assert down["default"] is down.default is adapter.toy_down
        assert "default" in down
        assert "missing" not in down
        assert 7 not in down
        assert len(down) == 2
        assert list(down) == list(down.keys()) == ["default", "other"]
        assert dict(down.items())["default"] is adapter.toy_down
        assert down.values()[0] is adapter.toy_down
        with pytest.raises(KeyError, match="missing"):
            down["missing"]

    def test_like_a_parameter_dict(self, model):
        bare = model[0].toy_bare
        adapter = model[0].adapters["default"]
        assert bare["default"] is bare.default is adapter.toy_bare
        assert list(bare.keys()) == ["default", "other"]
        assert model[0].toy_kept["default"] is model[0].toy_kept.default is adapter.toy_kept

    def test_setting_passes_through(self, model, x):
        layer = model[0]
        before = model(x)
        new = nn.Parameter(torch.zeros(4, 1))
        layer.toy_bare["default"] = new
        assert layer.adapters["default"].toy_bare is new
        assert not torch.equal(model(x), before)
        layer.toy_down["default"] = linear(torch.zeros(2, 6))
        assert_one(layer)
        layer.toy_down.other = linear(torch.ones(2, 6))
        assert_one(layer, "other")
        layer.adapters["default"].toy_bare = nn.Parameter(torch.ones(4, 1))
        assert_one(layer)
        assert torch.equal(model.state_dict()["0.toy_bare.default"], torch.ones(4, 1))

    def test_setting_what_no_adapter_has(self, model):
        with pytest.raises(KeyError, match="missing"):
            model[0].toy_bare["missing"] = nn.Parameter(torch.ones(1))

    def test_deleting_passes_through(self, model):
        layer = model[0]
        del layer.toy_bare.other
        assert "toy_bare" not in layer.adapters["other"]._parameters
        assert list(layer.toy_bare) == ["default"]
        del layer.toy_down.other
        assert not hasattr(layer.adapters["other"], "toy_down")
        assert len(layer.toy_down) == 1
        assert "0.toy_down.other.weight" not in model.state_dict()

    def test_the_view_is_a_dict(self, model):
        view = model[0].toy_bare._parameters
        assert isinstance(view, dict)
        shown = {"default": view["default"], "other": view["other"]}
        assert dict(view) == {**view} == view.copy() == shown
        assert view == shown
        assert {"more": 1} | view == {"more": 1, **shown}
        assert view | {"more": 1} == {**shown, "more": 1}
        assert view.get("missing") is None
        assert bool(view)
        new = nn.Parameter(torch.zeros(4, 1))
        view |= {"other": new}
        assert model[0].adapters["other"].toy_bare is new
        assert view.pop("other") is new
        assert len(view) == 1

    def test_an_entry_that_one_adapter_lacks(self):
        layer = layer_of("full")
        layer.add_adapter("bare", Bare(layer.bare_site, None), "toy")
        assert list(layer.toy_bare) == ["full", "bare"]
        assert list(layer.toy_down) == ["full"]
        with pytest.raises(AttributeError):
            layer.toy_down.bare  # noqa: B018 - reading it is what raises

    def test_deleting_adapters(self, model):
        layer = model[0]
        layer.delete_adapter("other")
        assert sorted(model.state_dict()) == sorted(key for key in KEYS if "other" not in key)
        assert layer.toy_scratch._non_persistent_buffers_set == {"default"}
        layer.delete_adapter("default")
        assert list(layer._modules) == ["base_layer"]
        assert not hasattr(layer, "toy_bare")
        layer.add_adapter("default", Toy(layer.bare_site, None), "toy")
        assert_one(layer)


class TestPlainAttributes:
    def test_read_and_set(self, model, x):
        layer = model[0]
        assert layer.scaling["default"] == layer.scaling["other"] == 2.0
        assert dict(layer.scaling) == {"default": 2.0, "other": 2.0}
        before = model(x)
        layer.scaling["default"] = 3.0
        assert layer.adapters["default"].scaling == layer.scaling["default"] == 3.0
        assert not torch.equal(model(x), before)
        layer.scaling.update(other=5.0)
        assert layer.adapters["other"].scaling == 5.0
        assert repr(layer.scaling) == "{'default': 3.0, 'other': 5.0}"

    def test_what_only_some_adapters_have(self, model):
        layer = model[0]
        layer.add_adapter("bare", Bare(layer.bare_site, None), "toy")
        assert list(layer.scaling) == ["default", "other"]
        assert len(layer.scaling) == 2
        with pytest.raises(KeyError, match="bare"):
            layer.scaling["bare"]
        with pytest.raises(KeyError, match="missing"):
            layer.scaling["missing"]

    def test_a_part_that_no_adapter_has(self, model):
        assert not hasattr(model[0], "part")
        model[0].adapters["other"].join(Part([], None))
        assert list(model[0].part) == ["other"]

    def test_delete(self, model):
        attribute = PerAdapter({"default": model[0].adapters["default"]}, "scaling", lambda name: None)
        del attribute["default"]
        assert not attribute
        assert not hasattr(model[0].adapters["default"], "scaling")


class TestCopies:
    @pytest.fixture(params=["deepcopy", "pickle", "torch.save"])
    def duplicate(self, request, model):
        if request.param == "deepcopy":
            return copy.deepcopy(model)
        if request.param == "pickle":
            return pickle.loads(pickle.dumps(model))  # noqa: S301
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    def test_the_copy_is_whole_and_its_own(self, model, duplicate, x):
        y = model(x)
        assert torch.equal(duplicate(x), y)
        for name in ("default", "other"):
            assert_one(duplicate[0], name)
        assert duplicate[0]._stack[0] is duplicate[0].adapters["default"]
        theirs = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        assert not theirs & {id(tensor) for tensor in (*duplicate.parameters(), *duplicate.buffers())}
        with torch.no_grad():
            duplicate.get_parameter("0.toy_bare.default").zero_()
        assert not torch.equal(duplicate(x), y)
        assert torch.equal(model(x), y)
        assert sorted(duplicate.state_dict()) == sorted(KEYS)

    def test_the_copy_can_be_changed(self, duplicate, model):
        duplicate[0].delete_adapter("other")
        duplicate[0].add_adapter("more", Toy(duplicate[0].bare_site, None), "toy")
        assert duplicate[0].available_adapters == ["default", "more"]
        assert model[0].available_adapters == ["default", "other"]
        assert_one(duplicate[0], "more")

    def test_a_view_by_itself(self, model):
        view = copy.copy(model[0].toy_bare._parameters)
        assert view["default"] is model[0].toy_bare["default"]


class TestConversion:
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_dtype(self, model, x, overwrite):
        y = model(x)
        torch.__future__.set_overwrite_module_params_on_conversion(value=overwrite)
        try:
            model.double()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(value=False)
        tensors = [*model.parameters(), *model.buffers()]
        assert {tensor.dtype for tensor in tensors} == {torch.float64}
        assert_one(model[0])
        assert torch.allclose(model(x.double()).float(), y, atol=1e-6)
        model.to(torch.bfloat16)
        assert model[0].adapters["other"].toy_scratch.dtype is torch.bfloat16

    def test_flags(self, model):
        model.requires_grad_(requires_grad=False)
        assert not model[0].adapters["default"].toy_bare.requires_grad
        model[0].toy_down.requires_grad_(requires_grad=True)
        assert model[0].adapters["default"].toy_down.weight.requires_grad

    def test_zero_grad(self, model, x):
        model(x).sum().backward()
        assert model[0].adapters["default"].toy_bare.grad is not None
        model.zero_grad()
        assert model[0].adapters["default"].toy_bare.grad is None


class TestLoading:
    def test_strict(self, model, x):
        y = model(x)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(1)
        assert not torch.equal(model(x), y)
        model.load_state_dict(state, strict=True)
        assert torch.equal(model(x), y)

    def test_strict_names_what_is_wrong(self, model):
        state = model.state_dict()
        state["0.toy_bare.stranger"] = state.pop("0.toy_bare.other")
        with pytest.raises(RuntimeError, match=r"(?s)Missing key.*toy_bare\.other.*Unexpected key.*bare\.stranger"):
            model.load_state_dict(state)

    def test_assign_from_meta(self, model, x):
        y = model(x)
        empty = copy.deepcopy(model).to("meta")
        assert empty[0].adapters["default"].toy_bare.is_meta
        empty.load_state_dict(model.state_dict(), strict=True, assign=True)
        for name in ("default", "other"):
            assert_one(empty[0], name)
            empty[0].adapters[name].toy_scratch = torch.zeros(1)
        assert torch.equal(empty(x), y)
        assert list(dict(empty.named_buffers())) == list(dict(model.named_buffers()))

    def test_functional_call(self, model, x):
        y = model(x)
        other = torch.func.functional_call(model, {"0.toy_bare.default": torch.zeros(4, 1)}, x)
        assert not torch.allclose(other, y)
        assert torch.equal(model(x), y)
        same = torch.func.functional_call(model, dict(model.named_parameters()), x)
        assert torch.equal(same, y)

    def test_gradients_through_functional_call(self, model, x):
        parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
        gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, x).sum())(parameters)
        model(x).sum().backward()
        assert torch.allclose(gradients["0.toy_bare.default"], model[0].adapters["default"].toy_bare.grad)


class TestAdapterNames:
    @pytest.mark.parametrize(
        "names",
        [["weight"], ["lora_A"], ["0"], ["a", "ab"], ["default", "default2"], ["toy_bare", "base_layer"], ["é ü"]],
    )
    def test_hostile_and_legal(self, names, x):
        for name in names:
            check_adapter_name(name, RESERVED_NAMES)
        model = nn.Sequential(layer_of(*names))
        for name in names:
            assert_one(model[0], name)
            assert model.get_parameter(f"0.toy_bare.{name}") is model[0].adapters[name].toy_bare
            assert set(model[0].adapter_tensors(name)) == {"toy_bare", "toy_kept", "toy_down.weight"}
        assert len(model.state_dict()) == 2 + 3 * len(names)
        other = nn.Sequential(layer_of(*names))
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(x), model(x))
        model[0].set_adapter([])
        model[0].delete_adapter(names[0])
        assert model[0].available_adapters == sorted(names[1:])

    @pytest.mark.parametrize(
        "name", ["keys", "items", "values", "type", "train", "training", "_modules", "pop", "_view_of", "forward"]
    )
    def test_reserved(self, name):
        with pytest.raises(AdapterNameError, match=f"{name!r} cannot be an adapter name: it is an attribute of"):
            check_adapter_name(name, RESERVED_NAMES)

    def test_every_reserved_name_would_mean_something_else(self):
        containers = nn.ModuleDict(), EntryModule({}, "toy")
        assert all(any(hasattr(container, name) for container in containers) for name in RESERVED_NAMES)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.text(min_size=1, max_size=100), min_size=1, max_size=3, unique=True))
    def test_any_name(self, names):
        legal = [name for name in names if is_legal(name)]
        layer = layer_of(*legal)
        for name in legal:
            assert_one(layer, name)
            assert layer.get_parameter(f"toy_bare.{name}") is layer.adapters[name].toy_bare
        if legal:
            assert_one(copy.deepcopy(layer), legal[-1])
        layer.load_state_dict(layer.state_dict(), strict=True)


class TestClashes:
    @pytest.mark.parametrize("entry", ["base_layer", "weight", "bias", "merged_adapters", "_stack", "set_adapter"])
    def test_an_entry_that_is_taken(self, entry):
        class Clash(Adapter):
            entries = (entry,)

            def __init__(self, site, config):
                super().__init__(site, config)
                self._parameters[entry] = nn.Parameter(site.ones(1))

        layer = layer_of("default")
        with pytest.raises(PluginError, match=f"Clash holds tensors under {entry!r}, which is an attribute of "):
            layer.add_adapter("other", Clash(layer.bare_site, None), "toy")
        assert isinstance(layer.base_layer, nn.Linear)

    def test_what_the_base_layer_has_is_no_obstacle(self):
        class Columns(Adapter):
            entries = ("in_features",)

            def __init__(self, site, config):
                super().__init__(site, config)
                self.in_features = nn.Parameter(site.ones(1))

        layer = layer_of()
        layer.add_adapter("default", Columns(layer.bare_site, None), "toy")
        assert layer.get_parameter("in_features.default").shape == (1,)

    def test_attributes_of_the_author(self):
        layer = layer_of("default")
        adapter = Toy(layer.bare_site, None)
        adapter.method, adapter.frozen = "mine", ["mine too"]
        layer.add_adapter("other", adapter, "toy")
        assert (adapter.method, adapter.frozen) == ("mine", ["mine too"])
        assert layer.methods == {"toy"}


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="gloo's file store needs a POSIX path")
@pytest.mark.filterwarnings("ignore")
class TestSharding:
    def test_fsdp(self, process_group, model, x):
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        expected = copy.deepcopy(model)
        y = expected(x)
        wrapped = FullyShardedDataParallel(
            model,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy.NO_SHARD,
            auto_wrap_policy=lambda module, recurse, **_: recurse or isinstance(module, nn.Linear),
        )
        out = wrapped(x)
        assert torch.allclose(out, y)
        out.sum().backward()
        keys = {key.replace("_fsdp_wrapped_module.", "") for key in wrapped.state_dict()}
        assert keys == set(KEYS)
