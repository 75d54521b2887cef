"""LoRA+ and LoRA-FA: the groups and steps are PEFT's, and what PEFT's cannot do is right."""

import copy
import io

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import AdapterStateError, ArgumentError, KeywordError
from tunerkit.testing.parity import assert_close, peft_config
from tunerkit_lora import LoraConfig
from tunerkit_lora.optimizers import LoraFAOptimizer, create_lorafa_optimizer, create_loraplus_optimizer
from tunerkit_lora.optimizers.lorafa import project

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
theirs = pytest.importorskip("peft.optimizers", reason="PEFT's optimisers need transformers and accelerate")

TOKENS = torch.arange(12).reshape(2, 6)
LINEAR = ["wide", "narrow"]
PLUS = {"lr": 1e-2, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-3}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(20, 6), nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, tokens):
        return self.narrow(self.norm(torch.tanh(self.wide(self.words(tokens)))))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.weight, x)


def base():
    torch.manual_seed(0)
    return Net()


def lora(*targets, **settings):
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": list(targets or LINEAR), **settings})


def adapted(config=None, *others, model=None, library=tunerkit):
    """Attach adapters, all active, with numbers that are the same in both libraries."""
    configs = [config or lora(), *others]
    if library is peft:
        configs = [peft_config(each) for each in configs]
    model = library.get_peft_model(base() if model is None else model, configs[0])
    names = ["default", *(f"other{number}" for number, _ in enumerate(others))]
    for name, each in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, each)
    model.base_model.set_adapter(names if others else "default")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def groups(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        ([names[each] for each in group["params"]], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


def train(model, optimizer, inputs=TOKENS, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def state(model):
    return {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}


def changed(model, before):
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name][0])}


def same(before, model):
    after = state(model)
    return all(
        torch.equal(after[name][0], tensor) and after[name][1] == trains for name, (tensor, trains) in before.items()
    )


def assert_same_steps(ours, other):
    reached, expected = dict(ours.named_parameters()), dict(other.named_parameters())
    assert set(reached) == set(expected)
    for name, tensor in reached.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


# --- LoRA+.


CONFIGS = {
    "plain": [lora()],
    "biases and whole modules": [lora(bias="all", modules_to_save=["norm"])],
    "a bias of its own": [lora(lora_bias=True)],
    "embedding": [lora("words", "wide")],
    "dora": [lora("words", "wide", use_dora=True)],
    "two adapters": [lora(), lora("wide", "words", r=2)],
}


@pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
def test_loraplus_has_the_groups_and_steps_of_peft(configs):
    model, other = adapted(*configs), adapted(*configs, library=peft)
    before = state(model)
    ours = create_loraplus_optimizer(model, torch.optim.AdamW, **PLUS)
    other_optimizer = theirs.create_loraplus_optimizer(other, torch.optim.AdamW, **PLUS)
    assert groups(model, ours) == groups(other, other_optimizer)
    assert sum(len(group["params"]) for group in ours.param_groups) == len(trained(model))
    train(model, ours)
    train(other, other_optimizer)
    assert changed(model, before) == set(trained(model))
    assert_same_steps(model, other)


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (lambda: nn.Conv2d(4, 6, 3), lora("0", use_dora=True, bias="lora_only")),
        (lambda: nn.MultiheadAttention(8, 2), lora("0", bias="all")),
        (Experts, LoraConfig(target_modules=[], target_parameters=["0.weight"])),
    ],
    ids=["convolution", "attention", "experts"],
)
def test_loraplus_has_the_groups_of_peft_on_other_layers(make, config):
    found = []
    for library, create in ((tunerkit, create_loraplus_optimizer), (peft, theirs.create_loraplus_optimizer)):
        model = adapted(config, model=nn.Sequential(make()), library=library)
        found.append(groups(model, create(model, torch.optim.SGD, **PLUS)))
    assert found[0] == found[1]


def test_loraplus_goes_by_what_a_tensor_is_and_not_by_names():
    for library, create in ((tunerkit, create_loraplus_optimizer), (peft, theirs.create_loraplus_optimizer)):
        model = library.get_peft_model(base(), lora() if library is tunerkit else peft_config(lora()), "biased")
        counts = [len(group["params"]) for group in create(model, torch.optim.SGD, **PLUS).param_groups]
        assert counts == ([2, 0, 2, 0] if library is tunerkit else [2, 0, 0, 2])


def test_loraplus_without_a_peft_model():
    model = tunerkit.inject_adapter_in_model(lora(), base())
    optimizer = create_loraplus_optimizer(nn.Sequential(model), torch.optim.SGD, **PLUS, momentum=0.5)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0, 2, 0]
    assert optimizer.defaults["momentum"] == 0.5


def test_loraplus_keeps_a_whole_embedding_in_32_bits():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="its optimisers of eight bits are what is asked")
    model = adapted(lora(modules_to_save=["words"]))
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    known = len(manager.module_weight_config_triple)
    create_loraplus_optimizer(model, torch.optim.AdamW, **PLUS)
    assert len(manager.module_weight_config_triple) == known
    create_loraplus_optimizer(model, bitsandbytes.optim.Lion8bit, **PLUS)
    [(module, leaf, setting)] = manager.module_weight_config_triple[known:]
    del manager.module_weight_config_triple[known:]
    assert getattr(module, leaf) is model.base_model.model.words.modules_to_save["default"].weight
    assert setting == {"optim_bits": 32}


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


@pytest.mark.parametrize(
    ("optimizer", "values", "error", "message"),
    [
        (torch.optim.SGD, {"loraplus_lr_ratio": 0}, ArgumentError, "loraplus_lr_ratio must be a number above zero; it"),
        (torch.optim.SGD, {"loraplus_lr_ratio": "16"}, ArgumentError, "above zero; it is '16'"),
        (torch.optim.SGD, {"loraplus_lr_ratio": float("nan")}, ArgumentError, "above zero; it is nan"),
        (torch.optim.SGD, {"loraplus_lr_embedding": -1}, ArgumentError, "must be a number of at least zero; it is -1"),
        (torch.optim.SGD, {"loraplus_weight_decay": -1}, ArgumentError, "must be a number of at least zero; it is -1"),
        (torch.optim.SGD, {"weight_decay": 0.1}, KeywordError, "Pass it as loraplus_weight_decay"),
        (nn.Linear, {}, ArgumentError, "optimizer_cls must be a class of optimisers, for example"),
        ("adamw", {}, ArgumentError, "it is 'adamw'"),
        (WithoutRate, {}, ArgumentError, "The optimiser WithoutRate takes no lr, which each group here has its own of"),
        (torch.optim.Rprop, {}, ArgumentError, "The optimiser Rprop takes no weight_decay"),
    ],
)
def test_what_loraplus_refuses(optimizer, values, error, message):
    model = adapted()
    before = state(model)
    with pytest.raises(error, match=message):
        create_loraplus_optimizer(model, optimizer, **{**PLUS, **values})
    assert same(before, model)


def test_loraplus_in_peft_ignores_a_plain_weight_decay():
    settings = {"lr": 1e-2, "loraplus_lr_ratio": 2, "weight_decay": 0.1}
    optimizer = theirs.create_loraplus_optimizer(adapted(library=peft), torch.optim.AdamW, **settings)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_loraplus_takes_a_class_that_passes_settings_on():
    class Wrapped(torch.optim.AdamW):
        def __init__(self, params, **settings):
            super().__init__(params, **settings)

    assert create_loraplus_optimizer(adapted(), Wrapped, **PLUS).param_groups[2]["lr"] == 4e-2


# --- LoRA-FA.


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "config",
    [lora(), lora(bias="all", modules_to_save=["norm"]), lora(r=7, use_rslora=True, alpha_pattern={"wide": 20})],
)
def test_lorafa_takes_the_steps_of_peft(config, decay, monkeypatch):
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)  # see the test after the next
    model, other = adapted(config), adapted(config, library=peft)
    before = state(model)
    optimizer = create_lorafa_optimizer(model, config.r, config.lora_alpha, 1e-2, decay)
    other_optimizer = theirs.create_lorafa_optimizer(other, config.r, config.lora_alpha, 1e-2, decay)
    assert set(trained(model)) == set(trained(other))
    train(model, optimizer)
    train(other, other_optimizer)
    assert changed(model, before) == set(trained(model))
    assert_same_steps(model, other)


def test_lorafa_takes_nearly_the_steps_that_peft_takes_without_a_patch():
    model, other = adapted(), adapted(library=peft)
    before = state(model)
    train(model, create_lorafa_optimizer(model, 3, 6, 1e-2))
    train(other, theirs.create_lorafa_optimizer(other, 3, 6, 1e-2))
    expected = dict(other.named_parameters())
    for name, tensor in trained(model).items():
        assert (tensor - before[name][0]).abs().max() > 1e-2
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-3)


def test_lorafa_projects_in_float32_and_peft_in_bfloat16():
    errors = []
    for library, create in ((tunerkit, create_lorafa_optimizer), (peft, theirs.create_lorafa_optimizer)):
        model = adapted(library=library)
        optimizer = create(model, 3, 6, 1e-2)
        first, second = (model.get_parameter(f"base_model.model.wide.lora_{each}.default.weight") for each in "AB")
        train(model, optimizer, steps=1)
        key, moment = (second, "exp_avg") if library is tunerkit else ("base_model.model.wide.lora", "exp_avg_B")
        found = optimizer.state[key][moment].double() / 0.1
        expected = expected_projection(second.grad.double(), first.double(), 2.0)
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[0] < 1e-5
    assert errors[1] > 1e-3


def test_lorafa_freezes_the_first_factors_of_what_trains():
    model = adapted()
    model.add_adapter("idle", lora())
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters() if ".idle." in name}
    model.set_adapter("default")
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2)
    assert all(".lora_B.default." in name for name in trained(model))
    assert len(trained(model)) == 2
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters() if ".idle." in name}
    assert flags == after
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    firsts = [parameter for name, parameter in model.named_parameters() if ".lora_A.default." in name]
    assert {id(each) for each in given} == {id(each) for each in [*firsts, *trained(model).values()]}


def test_lorafa_keeps_no_input_for_the_backward():
    torch.manual_seed(0)
    model = tunerkit.get_peft_model(nn.Sequential(nn.Linear(64, 64)), lora("0"))
    x, kept = torch.randn(10, 64), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    assert any(tensor.shape == x.shape for tensor in kept)
    create_lorafa_optimizer(model, 3, 6, 1e-2)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    assert kept
    assert not any(tensor.shape == x.shape for tensor in kept)


def test_lorafa_leaves_the_flags_of_other_adapters():
    model = adapted()
    model.add_adapter("idle", lora())
    model.base_model.set_requires_grad("default", requires_grad=False)
    model.base_model.set_requires_grad("idle")
    create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2)
    assert set(trained(model)) == {name for name, _ in model.named_parameters() if ".lora_B.idle." in name}


def test_lorafa_in_peft_freezes_other_adapters_too():
    model = adapted(library=peft)
    model.add_adapter("idle", peft_config(lora()))
    model.base_model.set_requires_grad("idle")
    theirs.create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2)
    assert not any(".lora_A." in name for name in trained(model))


def test_a_closure_fails_in_peft():
    model = adapted(library=peft)
    optimizer = theirs.create_lorafa_optimizer(model, 3, 6, 1e-2)
    with pytest.raises(RuntimeError, match="does not require grad"):
        optimizer.step(lambda: model(TOKENS).sum().backward())


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors")  # which PEFT does
@pytest.mark.parametrize("name", ["dora", "a bias of its own", "two adapters"])
def test_lorafa_trains_where_peft_fails(name):
    model, other = adapted(*CONFIGS[name]), adapted(*CONFIGS[name], library=peft)
    before = state(model)
    train(model, create_lorafa_optimizer(model, 3, 6, 1e-2))
    assert changed(model, before) == set(trained(model))
    assert not any(".lora_A." in key for key in trained(model))
    with pytest.raises(TypeError, match="unsupported operand"):
        train(other, theirs.create_lorafa_optimizer(other, 3, 6, 1e-2))


def test_lorafa_trains_embeddings_and_in_peft_does_not():
    ours, others = {}, {}
    for found, library, create in (
        (ours, tunerkit, create_lorafa_optimizer),
        (others, peft, theirs.create_lorafa_optimizer),
    ):
        model = adapted(lora("words", "wide"), library=library)
        with torch.no_grad():
            model.get_parameter("base_model.model.words.lora_embedding_A.default").zero_()  # as it starts
        before = state(model)
        train(model, create(model, 3, 6, 1e-2))
        found["trains"], found["changed"] = set(trained(model)), changed(model, before)
    assert ours["trains"] == ours["changed"] == others["trains"]
    assert others["changed"] == {"base_model.model.wide.lora_B.default.weight"}


def expected_projection(gradient, first, scaling):
    return gradient @ torch.linalg.inv(first @ first.T) / scaling**2


def test_the_projection_is_the_step_closest_to_that_of_the_whole_weight():
    torch.manual_seed(0)
    first, whole = torch.randn(3, 7), torch.randn(5, 7)
    gradient = 2.0 * whole @ first.T  # by the chain rule, for a scale of two
    found = 2.0 * project(gradient, first, 2.0) @ first
    best = torch.linalg.lstsq(first.T, whole.T).solution.T @ first
    assert_close(found, best)


def test_the_projection_where_the_rank_is_not_full():
    torch.manual_seed(0)
    first = torch.randn(2, 4).repeat(3, 1)
    gradient = torch.randn(5, 4) @ first.T
    torch.testing.assert_close(project(gradient, first, 1.0) @ first @ first.T, gradient, rtol=1e-3, atol=1e-4)
    assert project(gradient, torch.zeros_like(first), 1.0).abs().max() == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_the_projection_on_a_convolution(groups):
    torch.manual_seed(0)
    model = adapted(lora("0", r=4), model=nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups)))
    layer = model.base_model.model[0]
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    gradient = torch.randn_like(second)
    found = project(gradient, first, 2.0)
    assert found.shape == second.shape == (6, 4 // groups, 1, 1)
    for rows, outputs, part in zip(first.chunk(groups), gradient.chunk(groups), found.chunk(groups), strict=True):
        assert_close(part.flatten(1), expected_projection(outputs.flatten(1), rows.flatten(1), 2.0))
    before = state(model)
    train(model, create_lorafa_optimizer(model, 4, 6, 1e-2), torch.randn(2, 4, 5, 5))
    assert changed(model, before) == set(trained(model))


def test_the_projection_on_experts():
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=["0.weight"])
    model = adapted(config, model=nn.Sequential(Experts()))
    optimizer = create_lorafa_optimizer(model, 2, 6, 1e-2)
    pair = optimizer.param_groups[0]
    first, second = pair["params"]
    assert (pair["scaling_factors"], pair["experts"]) == ([3.0], [3])
    gradient = torch.randn_like(second)
    found = project(gradient, first, 3.0, experts=3)
    for expert in range(3):
        rows = first[2 * expert : 2 * expert + 2]
        assert_close(found[:, expert::3], expected_projection(gradient[:, expert::3], rows, 3.0))
    before = state(model)
    train(model, optimizer, torch.randn(4, 6))
    assert changed(model, before) == set(trained(model))


def test_lorafa_in_half_precision():
    model = adapted().to(torch.bfloat16)
    before = state(model)
    optimizer = create_lorafa_optimizer(model, 3, 6, 1e-1)
    train(model, optimizer)
    assert changed(model, before) == set(trained(model))
    moments = [each["exp_avg"] for each in optimizer.state.values()]
    assert {moment.dtype for moment in moments} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in model.parameters())


def test_lorafa_passes_over_what_was_not_used():
    model = adapted(lora("wide", "narrow", modules_to_save=["norm"]))
    optimizer = create_lorafa_optimizer(model, 3, 6, 1e-2)
    before = state(model)
    model.base_model.model.wide(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    assert changed(model, before) == {"base_model.model.wide.lora_B.default.weight"}


def test_lorafa_computes_the_loss_anew_with_a_closure():
    model, other = adapted(), adapted()
    optimizer = create_lorafa_optimizer(model, 3, 6, 1e-2)

    def closure():
        optimizer.zero_grad()
        loss = model(TOKENS).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    train(other, create_lorafa_optimizer(other, 3, 6, 1e-2), steps=1)
    assert_same_steps(model, other)


def test_lorafa_tied_to_an_embedding():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
    model[1].weight = model[0].weight
    model = adapted(lora("0", "1", ensure_weight_tying=True), model=model)
    before = state(model)
    optimizer = create_lorafa_optimizer(model, 3, 6, 1e-2)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2]
    train(model, optimizer, torch.arange(9))
    assert changed(model, before) == set(trained(model))
    plus = create_loraplus_optimizer(model, torch.optim.SGD, **PLUS)
    assert [len(group["params"]) for group in plus.param_groups] == [0, 2, 0, 0]


def fa(model):
    return create_lorafa_optimizer(model, 3, 6, 1e-2, 0.1)


def plus(model):
    return create_loraplus_optimizer(model, torch.optim.AdamW, **PLUS)


@pytest.mark.parametrize("create", [fa, plus])
def test_saved_and_loaded_it_goes_on_as_if_never_stopped(create):
    model = adapted(lora(bias="all"))
    optimizer = create(model)
    train(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(model)
    again = create(resumed)
    again.load_state_dict(torch.load(file, weights_only=True))
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer)
    train(resumed, again)
    train(copied, copied_optimizer)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, resumed.get_parameter(name))
        assert torch.equal(tensor, copied.get_parameter(name))


def test_lorafa_of_plain_parameters_is_adamw():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    other = copy.deepcopy(layer)
    train(layer, LoraFAOptimizer(layer.parameters(), lr=1e-2, eps=1e-12), torch.randn(5, 4).detach())
    torch.manual_seed(0)
    nn.Linear(4, 3)
    train(other, torch.optim.AdamW(other.parameters(), lr=1e-2, eps=1e-12, weight_decay=0), torch.randn(5, 4))
    assert_same_steps(layer, other)


def test_lorafa_without_correction_starts_slowly():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    for weight, corrected in zip(weights, [True, False], strict=True):
        weight.grad = torch.ones(1)
        LoraFAOptimizer([weight], lr=1.0, correct_bias=corrected).step()
    assert 1 - weights[0].item() == pytest.approx(1, abs=1e-3)
    assert 1 - weights[1].item() == pytest.approx(0.1 / 0.001**0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "lr must be a number of at least zero; it is -1.0"),
        ({"eps": -1.0}, "eps must be a number of at least zero"),
        ({"weight_decay": None}, "weight_decay must be a number of at least zero; it is None"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers of at least zero and below one; they are \(0.9, 1.0\)"),
    ],
)
def test_numbers_that_are_wrong(values, message):
    with pytest.raises(ArgumentError, match=message):
        LoraFAOptimizer([nn.Parameter(torch.ones(1))], **values)


def test_groups_of_another_form():
    tensors = [nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    with pytest.raises(ArgumentError, match=r"there are 3 parameters and 3 scaling_factors\. create_lorafa_optimizer"):
        LoraFAOptimizer([{"params": tensors, "names": ["a", "b", "c"], "scaling_factors": [None, 1.0, 1.0]}])
    optimizer = LoraFAOptimizer([{"params": tensors[:2], "scaling_factors": [2.0]}])
    tensors[1].grad = torch.ones(2, 2)
    optimizer.step()
    assert (tensors[1] != 1).all()


def without_scale():
    model = adapted()
    model.base_model.model.wide.set_scale("default", 0)
    return model


@pytest.mark.parametrize(
    ("make", "values", "error", "message"),
    [
        (adapted, {"lr": -1}, ArgumentError, "lr must be a number of at least zero; it is -1"),
        (adapted, {"use_rslora": True}, ArgumentError, "use_rslora=True is given, and the adapter on 'wide' has"),
        (lambda: adapted(lora(init_lora_weights="mica")), {}, AdapterStateError, "its second factor does not train"),
        (without_scale, {}, AdapterStateError, "LoRA-FA cannot train the adapter on 'wide': its scale is 0. Use"),
    ],
)
def test_what_lorafa_refuses(make, values, error, message):
    model = make()
    before = state(model)
    with pytest.raises(error, match=message):
        create_lorafa_optimizer(model, **{"r": 3, "lora_alpha": 6, "lr": 1e-2, **values})
    assert same(before, model)


def test_lorafa_takes_the_setting_that_the_adapters_have():
    optimizer = create_lorafa_optimizer(adapted(), 3, 6, 1e-2, use_rslora=False)
    assert optimizer.param_groups[0]["scaling_factors"] == [2.0, 2.0]


@pytest.mark.parametrize("create", [fa, plus])
def test_models_with_nothing_to_train(create):
    with pytest.raises(ArgumentError, match=r"The model \(Net\) holds no LoRA adapter for the optimiser to train. Add"):
        create(base())
    model = adapted()
    model.base_model.set_requires_grad("default", requires_grad=False)
    with pytest.raises(AdapterStateError, match=r"No LoRA adapter of the model .* trains, so there is nothing to"):
        create(model)
    assert not trained(model)
