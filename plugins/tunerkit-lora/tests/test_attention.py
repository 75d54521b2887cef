"""LoRA on attention layers, here and in PEFT."""

import copy
import json
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tunerkit
from tunerkit.errors import TargetWarning, UnsupportedSiteError
from tunerkit.testing.parity import Pair, assert_close, assert_same_tensors, gradients, run
from tunerkit_lora import Linear, LoraConfig, LoraLayer, MultiheadAttention

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")


class Model(nn.Module):
    """Attends, with whatever arguments it is told to."""

    def __init__(self, width=8, heads=2, arguments=None, **kwargs):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, **kwargs)
        self.head = nn.Linear(width, 3)
        self.arguments = arguments or {}
        # Frozen: torch multiplies in another order where a weight trains.
        self.requires_grad_(requires_grad=False)

    def forward(self, query, key=None, value=None, **kwargs):
        key = query if key is None else key
        found, weights = self.attn(query, key, key if value is None else value, **self.arguments, **kwargs)
        return self.head(found), weights


def config(**kwargs):
    return LoraConfig(**{"target_modules": ["attn"], "r": 3, "lora_alpha": 6, **kwargs})


def moved(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".lora_" in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)
    return model.eval()


def folded(base, model):
    """Return the base with the adapter's products added to its weights by hand."""
    plain = copy.deepcopy(base).eval()
    layer = model.base_model.model.attn
    for owner, name, adapted in (
        (plain.attn, "in_proj_weight", layer),
        (plain.attn.out_proj, "weight", layer.base_layer.out_proj),
    ):
        down, up = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
        with torch.no_grad():
            getattr(owner, name).add_(adapted.scaling["default"] * (up @ down))
    return plain


def check_against_peft(base, settings, inputs, folder):
    pair = Pair(base, settings, inputs)
    pair.check_parameters()
    pair.check_tensors()
    pair.check_outputs()
    pair.check_disabled()
    pair.check_files(folder)
    ours, theirs = gradients(pair.ours, inputs), gradients(pair.theirs, inputs)
    assert max(gradient.abs().max().item() for gradient in theirs.values()) > 1e-3
    # PEFT adds the update of the output projection twice, but to its gradient once.
    assert_same_tensors(ours, {name: value * (2 if ".out_proj." in name else 1) for name, value in theirs.items()})
    pair.check_merged()


@given(
    heads=st.integers(1, 3),
    size=st.integers(1, 4),
    length=st.integers(2, 4),
    r=st.integers(1, 6),
    bias=st.booleans(),
    add_bias_kv=st.booleans(),
    batch_first=st.booleans(),
    use_rslora=st.booleans(),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_shape_is_as_in_peft(tmp_path_factory, heads, size, length, r, bias, add_bias_kv, batch_first, use_rslora):
    torch.manual_seed(0)
    width = heads * size
    base = Model(width, heads, bias=bias, add_bias_kv=add_bias_kv, batch_first=batch_first)
    inputs = {"query": torch.randn(2, length, width), "key": torch.randn(2, length, width)}
    check_against_peft(base, config(r=r, use_rslora=use_rslora), inputs, tmp_path_factory.mktemp("parity"))


def test_patterns_mean_the_attention_layer_for_both_projections(tmp_path):
    torch.manual_seed(0)
    settings = config(rank_pattern={"attn": 5}, alpha_pattern={"attn": 7})
    check_against_peft(Model(), settings, {"query": torch.randn(2, 4, 8)}, tmp_path)
    layer = tunerkit.get_peft_model(Model(), settings).base_model.model.attn
    assert layer.r == layer.out_proj.r == {"default": 5}
    with pytest.warns(TargetWarning, match=r"'attn\.out_proj' in rank_pattern fits no adapted module"):
        tunerkit.get_peft_model(Model(), config(rank_pattern={"attn.out_proj": 5}))


def test_two_adapters_are_as_in_peft(tmp_path):
    torch.manual_seed(0)
    pair = Pair(Model(), config(), {"query": torch.randn(2, 4, 8)})
    pair.add("other", config(r=2))
    pair.check_tensors()
    pair.check_outputs()
    pair.set_adapter("other")
    pair.check_outputs()
    pair.check_files(tmp_path)


class TestCalls:
    """The result is that of a plain layer whose weights were changed by hand."""

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"need_weights": False},
            {"average_attn_weights": False},
            {"attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1)},
            {"attn_mask": torch.zeros(4, 4).fill_diagonal_(-1.0)},
            {"attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False},
        ],
    )
    def test_arguments(self, arguments, batch_first, bias, grad):
        torch.manual_seed(0)
        base = Model(arguments=arguments, batch_first=batch_first, bias=bias)
        model = moved(tunerkit.get_peft_model(copy.deepcopy(base), config()))
        x = torch.randn(4, 4, 8)
        with torch.set_grad_enabled(grad):
            for inputs in ((x,), (x, torch.randn(4, 4, 8)), (x, torch.randn(4, 4, 8), torch.randn(4, 4, 8))):
                found, wanted, plain = model(*inputs), folded(base, model)(*inputs), base.eval()(*inputs)
                assert_close(found[0], wanted[0])
                assert (found[0] - plain[0]).abs().max() > 1e-3
                assert (found[1] is None) == (wanted[1] is None)
                if wanted[1] is not None:
                    assert_close(found[1], wanted[1])

    @pytest.mark.parametrize("kwargs", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"dropout": 0.3}])
    def test_settings_of_the_layer(self, kwargs):
        torch.manual_seed(0)
        base = Model(**kwargs)
        model = moved(tunerkit.get_peft_model(copy.deepcopy(base), config())).train()
        plain = folded(base, model).train()
        x, padding = torch.randn(4, 2, 8), torch.tensor([[False, False, False, True], [False] * 4])
        torch.manual_seed(1)
        found = model(x, key_padding_mask=padding)[0]
        torch.manual_seed(1)
        assert_close(found, plain(x, key_padding_mask=padding)[0])

    def test_all_by_name_and_all_by_position(self):
        torch.manual_seed(0)
        model = moved(tunerkit.get_peft_model(Model(), config()))
        layer, (query, key, value) = model.base_model.model.attn, torch.randn(3, 4, 2, 8)
        mask = torch.zeros(2, 4, dtype=torch.bool)
        wanted = layer(query, key, value, key_padding_mask=mask)
        for found in (
            layer(query, key, value, mask),
            layer(query, key=key, value=value),
            layer(value=value, key=key, query=query),
        ):
            assert torch.equal(found[0], wanted[0])
            assert torch.equal(found[1], wanted[1])

    def test_a_forward_changes_nothing(self):
        model = moved(tunerkit.get_peft_model(Model(), config()))
        layer = model.base_model.model.attn
        before = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
        state = {id(module): dict(module.__dict__) for module in model.modules()}
        model(torch.randn(4, 2, 8))[0].sum().backward()
        assert all(id(value) == before[name][0] for name, value in model.named_parameters())
        assert all(torch.equal(value, before[name][1]) for name, value in model.named_parameters())
        assert all(module.__dict__ == state[id(module)] for module in model.modules())
        assert layer.base_layer.in_proj_weight.grad is None


class TestPeft:
    """What PEFT does to its layers in a forward, and leaves out of it."""

    def test_it_replaces_parameters(self):
        theirs = moved(peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["attn"])))
        base = theirs.base_model.model.attn.base_layer
        before = base.in_proj_weight, base.in_proj_weight.clone()
        theirs(torch.randn(4, 2, 8))
        assert base.in_proj_weight is not before[0]
        assert not torch.equal(base.in_proj_weight, before[1])

    @pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
    def test_it_leaves_out_the_bias_of_the_input_projections(self):
        theirs = moved(peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["attn"], lora_bias=True)))
        ours = moved(tunerkit.get_peft_model(Model(), config(lora_bias=True)))
        x = torch.randn(4, 2, 8)
        for model, moves in ((theirs, False), (ours, True)):
            before = run(model, {"query": x})
            with torch.no_grad():
                model.base_model.model.attn.lora_B["default"].bias += 1
            assert ((run(model, {"query": x}) - before).abs().max() > 1e-3) == moves


class TestEncoder:
    """Torch's encoder reads the parameters and does not call the layer, in evaluation without gradients."""

    @pytest.fixture
    def base(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True)
        return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)}).requires_grad_(requires_grad=False).eval()

    @pytest.fixture
    def x(self):
        return torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))

    def adapted(self, base):
        return moved(tunerkit.inject_adapter_in_model(config(target_modules=["self_attn"]), copy.deepcopy(base)))

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("masked", [False, True])
    def test_the_fast_path_has_the_adapter_too(self, base, x, masked):
        model = self.adapted(base)
        mask = torch.tensor([[False] * 4, [False, False, True, True], [False, True, True, True]]) if masked else None
        slow = model["encoder"](x, src_key_padding_mask=mask)
        assert slow.requires_grad
        with torch.no_grad():
            plain, fast = (each["encoder"](x, src_key_padding_mask=mask) for each in (base, model))
        kept = torch.ones(3, 4, dtype=torch.bool) if mask is None else ~mask
        assert_close(fast[kept], slow[kept])
        assert (fast - plain).abs().max() > 1e-3

    def test_the_fast_path_is_taken(self, base, x, monkeypatch):
        model = self.adapted(base)
        monkeypatch.delattr(nn.TransformerEncoderLayer, "_sa_block")
        with torch.no_grad():
            model["encoder"](x)
        with pytest.raises(AttributeError, match="_sa_block"):
            model["encoder"](x)

    def test_disabled_routed_and_merged(self, base, x):
        model = moved(tunerkit.get_peft_model(copy.deepcopy(base)["encoder"], config(target_modules=["self_attn"])))
        with torch.no_grad():
            plain, adapted = base["encoder"](x), model(x)
            with model.disable_adapter():
                assert torch.equal(model(x), plain)
            model.add_adapter("other", config(target_modules=["self_attn"], r=2))
            assert torch.equal(model(x), adapted)
            with model.use_adapter("other"):
                assert torch.equal(model(x), plain)  # it is at its start
            model.merge_adapter(["default"])
            assert_close(model(x), adapted)
            model.unmerge_adapter()
            assert torch.equal(model(x), adapted)
            assert torch.equal(model.unload()(x), plain)

    def test_peft_leaves_the_adapter_out(self, base, x):
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["self_attn"]), copy.deepcopy(base))
        moved(theirs)
        assert (theirs.train()["encoder"](x) - base["encoder"](x)).abs().max() > 1e-3
        assert_close(theirs.eval()["encoder"](x), base["encoder"](x))

    def test_peft_leaves_out_the_feed_forward_layers_too(self, base, x):
        settings = {"target_modules": ["linear1", "linear2"], "r": 3, "init_lora_weights": False}
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(**settings), copy.deepcopy(base))
        ours = tunerkit.inject_adapter_in_model(LoraConfig(**settings), copy.deepcopy(base))
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            trained = theirs.train()["encoder"](x)
            assert torch.equal(theirs.eval()["encoder"](x), base["encoder"](x))
            assert_close(ours.eval()["encoder"](x), trained)
        assert (trained - base["encoder"](x)).abs().max() > 1e-3


class TestOutputProjection:
    def test_peft_adds_its_update_twice(self):
        torch.manual_seed(0)
        base, x = Model(), torch.randn(4, 2, 8)
        pair = Pair(base, config(), {"query": x})
        layer = pair.theirs.base_model.model.attn
        once = folded(base, pair.theirs)
        assert (run(once, {"query": x}) - run(pair.theirs, {"query": x})).abs().max() > 1e-3
        delta = layer.base_layer.out_proj.get_delta_weight("default")
        with torch.no_grad():
            once.attn.out_proj.weight += delta
        assert_close(run(once, {"query": x}), run(pair.theirs, {"query": x}))
        assert pair.ours.base_model.model.attn.out_proj.scaling == {"default": 4.0}
        assert layer.base_layer.out_proj.scaling == {"default": 2.0}

    def test_it_is_not_adapted_alone(self):
        for targets in (["out_proj"], ["attn.out_proj"]):
            with pytest.raises(
                UnsupportedSiteError, match="only along with the attention layer around it; target that"
            ):
                tunerkit.get_peft_model(Model(), config(target_modules=targets))
        model = tunerkit.get_peft_model(Model(), config(target_modules=["attn", "out_proj"]))
        assert model.targeted_module_names == ["attn", "attn.base_layer.out_proj"]

    def test_it_can_be_left_out(self):
        base = Model()
        model = moved(tunerkit.get_peft_model(copy.deepcopy(base), config(exclude_modules=["attn.out_proj"])))
        assert type(model.base_model.model.attn.out_proj) is type(base.attn.out_proj)
        assert (model(torch.ones(2, 2, 8))[0] - base.eval()(torch.ones(2, 2, 8))[0]).abs().max() > 1e-3

    def test_what_is_read_of_it(self):
        model = moved(tunerkit.get_peft_model(Model(bias=False), config(lora_bias=True)))
        layer = model.base_model.model.attn
        out, base = layer.out_proj, layer.base_layer.out_proj.base_layer
        weight = base.weight + 4 * out.lora_B["default"].weight @ out.lora_A["default"].weight
        assert_close(out.weight, weight)
        assert_close(out.bias, 4 * out.lora_B["default"].bias)
        assert_close(
            layer.in_proj_weight,
            layer.base_layer.in_proj_weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight,
        )
        with model.disable_adapter():
            assert out.weight is base.weight
            assert out.bias is None
            assert layer.in_proj_weight is layer.base_layer.in_proj_weight
        before = model(torch.ones(2, 2, 8))[0]
        assert_close(model.merge_and_unload()(torch.ones(2, 2, 8))[0], before)


class TestSeparateProjections:
    """Where key and value have sizes of their own."""

    @pytest.fixture
    def base(self):
        torch.manual_seed(0)
        return Model(kdim=5, vdim=7).eval()

    @pytest.fixture
    def inputs(self):
        generator = torch.Generator().manual_seed(1)
        return tuple(torch.randn(4, 2, width, generator=generator) for width in (8, 5, 7))

    def test_life(self, base, inputs, tmp_path):
        plain = base(*inputs)[0]
        model = tunerkit.get_peft_model(copy.deepcopy(base), config())
        assert torch.equal(model.eval()(*inputs)[0], plain)
        moved(model)
        adapted = model(*inputs)[0]
        by_hand = copy.deepcopy(base)
        layer = model.base_model.model.attn
        with torch.no_grad():
            for name in ("v_proj_weight", "k_proj_weight", "q_proj_weight"):
                assert layer.parameter_name == name
                getattr(by_hand.attn, name).add_(2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
                layer = layer.base_layer
            out = layer.out_proj
            by_hand.attn.out_proj.weight.add_(4 * out.lora_B["default"].weight @ out.lora_A["default"].weight)
        assert_close(adapted, by_hand(*inputs)[0])
        assert (adapted - plain).abs().max() > 1e-3
        adapted.sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_" in name)
        with model.disable_adapter():
            assert torch.equal(model(*inputs)[0], plain)

        model.save_pretrained(tmp_path)
        again = tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert_close(again.eval()(*inputs)[0], adapted)
        again.load_adapter(tmp_path, "second")
        again.set_adapter("second")
        assert_close(again.eval()(*inputs)[0], adapted)

        model.merge_adapter()
        assert_close(model(*inputs)[0], adapted)
        model.unmerge_adapter()
        assert torch.equal(model(*inputs)[0], adapted)
        merged = model.merge_and_unload()
        assert type(merged.attn) is nn.MultiheadAttention
        assert_close(merged(*inputs)[0], adapted)

    def test_peft_refuses_them(self, base):
        with pytest.raises(ValueError, match="Only same embed"):
            peft.get_peft_model(base, peft.LoraConfig(target_modules=["attn"]))

    def test_keys_and_plan(self, base):
        model = tunerkit.get_peft_model(base, config())
        assert {key.removeprefix("base_model.model.") for key in tunerkit.get_peft_model_state_dict(model)} == {
            f"attn{'.base_layer' * depth}{child}.lora_{factor}.weight"
            for depth, child in ((0, ""), (1, ""), (2, ""), (3, ".out_proj"))
            for factor in "AB"
        }
        adapted = tunerkit.plan(Model(kdim=5), config()).adapted
        assert adapted == ["attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", "attn.out_proj"]


class TestDropout:
    def test_refused_for_training(self):
        base = Model()
        before = dict(base.named_modules())
        with pytest.raises(
            UnsupportedSiteError, match=r"lora_dropout=0\.1 has no meaning for the attention layer 'attn'"
        ):
            tunerkit.get_peft_model(base, config(lora_dropout=0.1))
        assert dict(base.named_modules()) == before
        with pytest.raises(
            UnsupportedSiteError, match=r"'attn\.q_proj_weight' cannot be adapted with lora_dropout=0\.1"
        ):
            tunerkit.get_peft_model(Model(kdim=5), config(lora_dropout=0.1))

    def test_a_checkpoint_with_it_is_loaded(self, tmp_path):
        torch.manual_seed(0)
        base, x = Model(), torch.randn(4, 2, 8)
        settings = peft.LoraConfig(target_modules=["attn"], lora_dropout=0.1)
        theirs = moved(peft.get_peft_model(copy.deepcopy(base), settings))
        theirs.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.1
        ours = tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert_close(run(ours.eval(), {"query": x}), run(theirs, {"query": x}))
        with pytest.raises(UnsupportedSiteError, match="has no meaning"):
            tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)

    def test_peft_drops_nothing(self):
        theirs = moved(peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["attn"], lora_dropout=0.5)))
        x = torch.randn(4, 2, 8)
        assert torch.equal(theirs.train()(x)[0], theirs.eval()(x)[0])


def test_routes_in_threads():
    torch.manual_seed(0)
    model = moved(tunerkit.get_peft_model(Model(), config()))
    model.add_adapter("other", config())
    moved(model, seed=5)
    x = torch.randn(4, 2, 8)
    wanted = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        wanted[name] = model(x)[0].detach()
    assert (wanted["default"] - wanted["other"]).abs().max() > 1e-3
    wrong = []

    def work(name):
        with model.use_adapter(name):
            wrong.extend(name for _ in range(100) if not torch.equal(model(x)[0], wanted[name]))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("default", "other") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_types():
    layer = tunerkit.get_peft_model(Model(), config()).base_model.model.attn
    assert isinstance(layer, MultiheadAttention)
    assert isinstance(layer, LoraLayer)
    assert not isinstance(layer, Linear)
    assert isinstance(layer.out_proj, Linear)
    assert not isinstance(layer.base_layer, LoraLayer)
    assert layer.embed_dim == 8
    assert layer._qkv_same_embed_dim is True
    with pytest.raises(AttributeError, match="_nothing"):
        _ = layer._nothing


@pytest.mark.parametrize("grad", [True, False])
def test_compiled(grad):
    torch.manual_seed(0)
    model = moved(tunerkit.get_peft_model(Model(), config()))
    x = torch.randn(4, 2, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        assert_close(compiled(x)[0], model(x)[0])
