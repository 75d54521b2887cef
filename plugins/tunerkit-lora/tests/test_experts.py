"""LoRA on bare parameters, here and in PEFT."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tunerkit
from tunerkit.errors import NoMatchingPeftModuleError, TargetError, UnsupportedSiteError
from tunerkit.stack import StackSum
from tunerkit.testing.parity import Pair, assert_close, assert_same_tensors, check_parity, peft_config, run
from tunerkit_lora import Linear, LoraConfig, LoraLayer, ParamWrapper

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
transformers = pytest.importorskip("transformers", reason="PEFT's models to compare on are those of transformers")


class Experts(nn.Module):
    """Goes through the experts that are hit and reads the matrices of each."""

    def __init__(self, experts, width, hidden, *, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        shapes = ((width, hidden), (hidden, width)) if is_transposed else ((hidden, width), (width, hidden))
        self.up = nn.Parameter(torch.randn(experts, *shapes[0]) / 2)
        self.bias = nn.Parameter(torch.randn(experts, hidden))
        self.down = nn.Parameter(torch.randn(experts, *shapes[1]) / 2)

    def forward(self, x, experts):
        found = torch.zeros_like(x)
        for expert in experts.unique():
            up, down = self.up[expert], self.down[expert]
            rows = x[experts == expert]
            rows = rows @ (up if self.is_transposed else up.mT) + self.bias[expert]
            rows = torch.tanh(rows) @ (down if self.is_transposed else down.mT)
            found[experts == expert] = rows
        return found


class Mixture(nn.Module):
    def __init__(self, experts=3, width=6, hidden=4, *, is_transposed=False):
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.gate = nn.ParameterDict()
        self.experts = Experts(experts, width, hidden, is_transposed=is_transposed)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        scores = self.router(flat)
        found = self.experts(flat, scores.argmax(-1))
        return self.head((x + found.view_as(x)) * scores.softmax(-1).amax(-1).view(*x.shape[:-1], 1))


def config(**kwargs):
    return LoraConfig(**{"target_parameters": ["experts.up", "experts.down"], "r": 2, "lora_alpha": 6, **kwargs})


def moved(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".lora_" in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)
    return model.eval()


@given(
    experts=st.integers(1, 4),
    width=st.integers(2, 7),
    hidden=st.integers(2, 7),
    r=st.integers(1, 4),
    is_transposed=st.booleans(),
    use_rslora=st.booleans(),
    init=st.sampled_from([True, False, "gaussian"]),
    targets=st.sampled_from([["experts.up"], ["experts.down", "experts.up"], ["up", "router.weight"]]),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_shape_is_as_in_peft(tmp_path_factory, experts, width, hidden, r, is_transposed, use_rslora, init, targets):
    if is_transposed and experts == 1 and width != hidden:
        experts = 2  # PEFT adds the update of a single transposed expert the wrong way round, or cannot
    torch.manual_seed(0)
    base = Mixture(experts, width, hidden, is_transposed=is_transposed)
    wanted = config(target_parameters=targets, r=r, use_rslora=use_rslora, init_lora_weights=init)
    check_parity(base, wanted, {"x": torch.randn(2, 5, width)}, tmp_path_factory.mktemp("parity"))


def test_a_single_transposed_expert():
    torch.manual_seed(0)
    base, x = Mixture(1, 6, 4, is_transposed=True), torch.randn(5, 6)
    model = moved(tunerkit.get_peft_model(copy.deepcopy(base), config(target_parameters=["up"])))
    layer = model.base_model.model.experts
    with torch.no_grad():
        base.experts.up += 3 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).T
    assert_close(run(model, {"x": x}), run(base, {"x": x}))
    theirs = moved(peft.get_peft_model(Mixture(1, 6, 4, is_transposed=True), peft_config(config())))
    with pytest.raises(RuntimeError, match="size"):
        theirs(x)


@pytest.mark.filterwarnings("ignore:The following")  # PEFT says of patterns for parameters that they mean nothing
@pytest.mark.parametrize(
    "wanted",
    [
        {"rank_pattern": {"experts.up": 5}, "alpha_pattern": {"down": 9}},
        {"target_modules": ["router", "head"]},
        {"target_modules": ["head"], "target_parameters": ["router.weight", "experts.down"]},
        {"target_modules": []},
    ],
)
def test_selections(wanted, tmp_path):
    torch.manual_seed(0)
    check_parity(Mixture(), config(**wanted), {"x": torch.randn(2, 5, 6)}, tmp_path)


def test_two_adapters(tmp_path):
    torch.manual_seed(0)
    pair = Pair(Mixture(), config(), {"x": torch.randn(2, 5, 6)})
    pair.add("other", config(r=3, lora_alpha=2))
    pair.check_parameters()
    pair.check_tensors()
    pair.check_outputs()
    pair.set_adapter("other")
    pair.check_outputs()
    pair.check_gradients()
    pair.check_files(tmp_path)
    both = ["default", "other"]
    pair.ours.base_model.set_adapter(both)
    pair.theirs.base_model.set_adapter(both)
    pair.check_outputs()
    pair.check_merged()


class TestDifferentParameters:
    """Adapters may adapt different parameters of a module; PEFT wants the same for all."""

    @pytest.mark.parametrize(("first", "second"), list(itertools.permutations([["up", "down"], ["up"], ["down"]], 2)))
    def test_files_are_those_of_the_adapter_alone(self, first, second, tmp_path):
        torch.manual_seed(0)
        base, x = Mixture(), torch.randn(2, 5, 6)
        model = tunerkit.get_peft_model(copy.deepcopy(base), config(target_parameters=first), "first")
        model.add_adapter("second", config(target_parameters=second))
        moved(model).save_pretrained(tmp_path)
        for name in ("first", "second"):
            model.set_adapter(name)
            alone = tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
            assert_close(run(alone, {"x": x}), run(model, {"x": x}))
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
            assert_close(run(theirs, {"x": x}), run(model, {"x": x}))
            assert_same_tensors(
                tunerkit.get_peft_model_state_dict(alone), tunerkit.get_peft_model_state_dict(model, adapter_name=name)
            )
        again = tunerkit.get_peft_model(copy.deepcopy(base), config(target_parameters=["down"]), "other")
        for name in ("second", "first"):
            again.load_adapter(tmp_path / name, name)
            again.set_adapter(name)
            model.set_adapter(name)
            assert_close(run(again.eval(), {"x": x}), run(model, {"x": x}))

    def test_peft_refuses(self):
        theirs = peft.get_peft_model(Mixture(), peft_config(config()))
        with pytest.raises(ValueError, match="must target the same set"):
            theirs.add_adapter("other", peft_config(config(target_parameters=["up"])))


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module", params=["Mixtral", "Qwen3Moe", "GptOss"])
def family(request):
    torch.manual_seed(0)
    made = getattr(transformers, f"{request.param}Config")(**TINY)
    return getattr(transformers, f"{request.param}ForCausalLM")(made).eval()


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_transformers(family, way, tmp_path):
    base = copy.deepcopy(family)
    base.config._experts_implementation = way
    wanted = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    embeds = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    pair = Pair(base, wanted, {"inputs_embeds": embeds})
    pair.check_parameters()
    pair.check_tensors()
    pair.check_outputs()
    pair.check_disabled()
    pair.check_gradients()
    if way == "eager":
        pair.check_files(tmp_path)
    pair.check_merged()


class Sizes(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made within the block."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.largest = max(self.largest, tensor.numel())
        return made


class TestOnlyWhatIsRead:
    """Of 64 experts 2 are hit, and no tensor of the size of the stack is made."""

    EXPERTS, WIDTH, HIDDEN = 64, 32, 48

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        base = Mixture(self.EXPERTS, self.WIDTH, self.HIDDEN)
        with torch.no_grad():
            base.router.bias[5] = base.router.bias[9] = 100.0
        return moved(tunerkit.get_peft_model(base, config()))

    def test_largest_tensor(self, model):
        x = torch.randn(10, self.WIDTH)
        one, stack = self.WIDTH * self.HIDDEN, self.EXPERTS * self.WIDTH * self.HIDDEN
        factor = 2 * self.EXPERTS * max(self.WIDTH, self.HIDDEN)
        with Sizes() as sizes:
            output = model(x)
            assert 1 < len(model.base_model.model.router(x).argmax(-1).unique()) <= 3
        assert one <= sizes.largest <= factor < stack
        with Sizes() as sizes:
            output.sum().backward()
        assert sizes.largest <= factor
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if ".lora_" in name}
        model.zero_grad()
        layer = model.base_model.model.experts
        whole = copy.deepcopy(model.base_model.model)
        adapter, inner = layer.adapters["default"], layer.base_layer.adapters["default"]
        whole.experts = layer.base_layer.base_layer
        wanted = torch.func.functional_call(
            whole,
            {
                "experts.down": whole.experts.down + adapter.delta(layer.bare_site),
                "experts.up": whole.experts.up + inner.delta(layer.base_layer.bare_site),
            },
            (x,),
        )
        assert_close(output, wanted)
        wanted.sum().backward()
        assert_same_tensors(gradients, {name: p.grad for name, p in model.named_parameters() if ".lora_" in name})

    def test_peft_makes_the_whole(self, model):
        base = Mixture(self.EXPERTS, self.WIDTH, self.HIDDEN)
        theirs = moved(peft.get_peft_model(base, peft_config(config())))
        with Sizes() as sizes:
            theirs(torch.randn(10, self.WIDTH))
        assert sizes.largest >= self.EXPERTS * self.WIDTH * self.HIDDEN

    def test_two_active_adapters(self, model):
        model.add_adapter("other", config(r=3))
        model.base_model.set_adapter(["default", "other"])
        moved(model, seed=3)
        x = torch.randn(10, self.WIDTH)
        with Sizes() as sizes:
            output = model(x)
        assert sizes.largest < self.EXPERTS * self.WIDTH * self.HIDDEN
        assert_close(model.merge_and_unload()(x), output)

    def test_compiled(self):
        class Reads(nn.Module):
            def __init__(self):
                super().__init__()
                self.up = nn.Parameter(torch.randn(4, 5, 6))

            def forward(self, x):
                return x @ self.up[1] + (x[None] @ self.up).sum(0)

        torch._dynamo.reset()
        reads = tunerkit.inject_adapter_in_model(config(target_parameters=["0.up"]), nn.Sequential(Reads()))
        moved(reads)
        x = torch.randn(3, 5)
        compiled = torch.compile(reads, backend="eager", fullgraph=True)
        assert_close(compiled(x), reads(x))


def test_a_parameter_that_is_read_from_outside():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.tanh(x @ self.inner.weight.T))

    torch.manual_seed(0)
    base, x = Reader(), torch.randn(3, 4)
    model = moved(tunerkit.get_peft_model(copy.deepcopy(base), config(target_parameters=["inner.weight"])))
    assert (model(x) - base(x)).abs().max() > 1e-3
    output = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert_close(model.merge_and_unload()(x), output)
    theirs = moved(
        peft.get_peft_model(Reader(), peft.LoraConfig(target_modules=[], target_parameters=["inner.weight"]))
    )
    with theirs.disable_adapter():
        plain = theirs(x)
    assert torch.equal(theirs(x), plain)


def test_half_precision():
    torch.manual_seed(0)
    base, x = Mixture(), torch.randn(5, 6)
    single = moved(tunerkit.get_peft_model(copy.deepcopy(base), config()))
    model = tunerkit.get_peft_model(copy.deepcopy(base).bfloat16(), config())
    tunerkit.set_peft_model_state_dict(model, tunerkit.get_peft_model_state_dict(single))
    layer = model.base_model.model.experts
    assert layer.lora_A["default"].weight.dtype is torch.float32
    assert type(layer.up) is StackSum
    assert layer.up.dtype is torch.bfloat16
    output = layer(x.bfloat16(), torch.zeros(5, dtype=torch.long))
    assert output.dtype is torch.bfloat16
    wanted = single.base_model.model.experts(x, torch.zeros(5, dtype=torch.long))
    assert (output - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_types_and_names():
    model = tunerkit.get_peft_model(Mixture(), config(target_modules=["head"]))
    outer = model.base_model.model.experts
    inner = outer.base_layer
    assert [outer.parameter_name, inner.parameter_name] == ["down", "up"]
    for layer in (outer, inner):
        assert isinstance(layer, ParamWrapper)
        assert isinstance(layer, LoraLayer)
        assert not isinstance(layer, Linear)
    assert outer.num_experts == {"default": 3}
    assert outer.is_transposed is False
    assert model.targeted_parameter_names == ["experts.up", "experts.down"]


class TestRefused:
    @pytest.mark.parametrize(
        ("setting", "shown"),
        [
            ({"lora_dropout": 0.1}, r"lora_dropout=0\.1"),
            ({"lora_bias": True}, "lora_bias=True"),
            ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ],
    )
    def test_what_needs_a_layer(self, setting, shown):
        base = Mixture()
        before = dict(base.named_modules())
        with pytest.raises(
            UnsupportedSiteError, match=rf"'experts\.up' cannot be adapted with {shown}, which needs a layer"
        ):
            tunerkit.get_peft_model(base, config(**setting))
        assert dict(base.named_modules()) == before
        theirs = {"target_parameters": ["experts.up"], "target_modules": [], **setting}
        with pytest.raises(ValueError, match="ParamWrapper does not work with"):
            peft.get_peft_model(Mixture(), peft.LoraConfig(**theirs))

    @pytest.mark.parametrize("name", ["experts.bias", "head.bias", "experts.count"])
    def test_shapes_and_dtypes(self, name):
        base = Mixture()
        base.experts.count = nn.Parameter(torch.ones(3, 4, dtype=torch.long), requires_grad=False)
        if name == "experts.bias":
            base.experts.bias = nn.Parameter(torch.ones(2, 2, 2, 2))
        with pytest.raises(UnsupportedSiteError, match="LoRA adapts matrices and stacks of matrices"):
            tunerkit.get_peft_model(base, config(target_parameters=[name]))

    def test_nothing_matched(self):
        with pytest.raises(NoMatchingPeftModuleError, match="target_parameters="):
            tunerkit.get_peft_model(Mixture(), config(target_parameters=["experts.upp"]))

    def test_from_a_state_dict(self):
        tensors = tunerkit.get_peft_model_state_dict(tunerkit.get_peft_model(Mixture(), config()))
        with pytest.raises(TargetError, match="target_parameters cannot be found from the keys"):
            tunerkit.inject_adapter_in_model(config(), Mixture(), state_dict=tensors)
