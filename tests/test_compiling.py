"""How many graphs `torch.compile` makes of a model with adapters: one for all adapters of one shape."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from toys import bare, bottleneck, registered, rotation

import tunerkit
from tunerkit.testing.bench import difference, move
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
COUNT = 10
"""More adapters than the graphs that torch makes of one function before it refuses."""

CONFIGS = {
    "LoRA": lambda: LoraConfig(r=2, target_modules=["0", "2"]),
    "DoRA": lambda: LoraConfig(r=2, use_dora=True, target_modules=["0", "2"]),
    "IA3": lambda: IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
    **{toy.method.adapter.__name__: lambda toy=toy: toy.Config(target_modules=["0", "2"]) for toy in (bare, rotation)},
    "a function between": lambda: bottleneck.Config(target_modules=["0", "2"]),
}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    with registered(bare, bottleneck, rotation):
        yield
    torch.compiler.reset()


def served(config, count=COUNT):
    """Return a model with adapters of one shape."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    for number in range(count):
        if number:
            model.add_adapter(f"a{number}", config())
        else:
            model = tunerkit.get_peft_model(model, config(), "a0")
        move(model, f"a{number}", seed=number)
    return model.eval()


def compiled(model):
    counter = CompileCounter()
    return torch.compile(model, backend=counter, fullgraph=True), counter


def step(model, call):
    """Return the loss and the gradients of a training step."""
    model.zero_grad()
    loss = call(X).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestOneGraph:
    def test_for_what_is_made_active(self, config):
        model = served(config)
        call, counter = compiled(model)
        outputs = []
        with torch.no_grad():
            for name in (*model.peft_config, "a0"):
                model.set_adapter(name)
                outputs.append(call(X))
                assert difference(outputs[-1], model(X)) < 1e-5
        assert difference(outputs[0], outputs[1]) > 1e-3
        assert counter.frame_count == 1

    def test_for_what_calls_are_routed_to(self, config):
        """The active adapter's tensors train and have a graph of their own; so has a call that is not routed."""
        model = served(config)
        call, counter = compiled(model)
        graphs = []
        with torch.no_grad():
            for name in (*model.peft_config, "a0"):
                with model.use_adapter(name):
                    assert difference(call(X), model(X)) < 1e-5
                graphs.append(counter.frame_count)
            assert difference(call(X), model(X)) < 1e-5
        assert graphs == [1, *[2] * COUNT]
        assert counter.frame_count == 3

    def test_for_a_training_step(self, config):
        model = served(config, count=3)
        counter = CompileCounterWithBackend("aot_eager")
        call = torch.compile(model, backend=counter, fullgraph=True)
        for name in (*model.peft_config, "a0"):
            model.set_adapter(name)
            found, wanted = step(model, call), step(model, model)
            assert len(found) == len(wanted) > 2
            assert all(difference(a, b) < 1e-4 for a, b in zip(found, wanted, strict=True))
        assert counter.frame_count == 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_whatever_is_active_while_a_call_is_routed(config):
    """A graph that was made where the two are one adapter is right where they are not."""
    model = served(config, count=3)
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    call, counter = compiled(model)
    for active in model.peft_config:
        model.set_adapter(active, inference_mode=True)
        assert difference(call(X), model(X)) < 1e-5
        for name in (active, *model.peft_config, ["a0", "a1"], ["a2", "a0"], []):
            with model.use_adapter(name):
                assert difference(call(X), model(X)) < 1e-5
    assert counter.frame_count == 4


def test_an_adapter_that_comes_and_goes_within_the_block():
    model = served(CONFIGS["LoRA"], count=2)
    call, _ = compiled(model)
    with model.use_adapter("a1"):
        before = call(X)
        model.add_adapter("other", CONFIGS["IA3"]())
        model.delete_adapter("other")
        model.add_adapter("wider", LoraConfig(r=2, target_modules=["0"]))
        assert torch.equal(call(X), before)


def test_layers_that_were_copied_by_themselves():
    """They bring the number of the layer they were copied from."""
    model = served(CONFIGS["LoRA"], count=2)
    base = model.get_base_model()
    base.append(nn.Linear(4, 6))
    base.append(copy.deepcopy(base[0]))
    with torch.no_grad():
        for parameter in base[4].parameters():
            parameter.mul_(-1.5)
    call, _ = compiled(model)
    for name in ("a0", "a1"):
        with model.use_adapter(name):
            assert difference(call(X), model(X)) < 1e-5
