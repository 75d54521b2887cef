"""Threads that call one model, each with its own adapter, while another loads and deletes further adapters."""

from __future__ import annotations

import sys
import threading
import traceback

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import CheckpointError
from tunerkit.rows import BASE
from tunerkit.testing.bench import difference, move
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

THREADS = 8
SWITCHES = 1e-5
"""Seconds after which the interpreter goes to another thread; 5e-3 is usual."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.middle = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


class Perceptron:
    targets = ("first", "last")
    more = ("first", "middle")
    shape = (4, 6)
    make = Net

    @staticmethod
    def run(model, x, **names):
        return model(x, **names)


class Llama:
    targets = ("q_proj", "v_proj", "down_proj")
    more = ("q_proj", "up_proj")
    shape = (4, 3, 16)

    @staticmethod
    def make():
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
            pad_token_id=0,
            initializer_range=0.3,
            use_cache=False,
        )
        return transformers.LlamaForCausalLM(config)

    @staticmethod
    def run(model, x, **names):
        return model(inputs_embeds=x, **names).logits


def lora(targets, number=0):
    return LoraConfig(r=2 + number % 2, target_modules=list(targets))


def ia3(targets, number=0):
    return IA3Config(target_modules=list(targets), feedforward_modules=[targets[-1]])


KINDS = {
    "LoRA": lora,
    "IA3": ia3,
    "mixed": lambda targets, number=0: (lora, ia3)[number % 2](targets, number // 2),
}


def served(net, kind):
    """Return a model with an adapter for each thread, all moved."""
    torch.manual_seed(0)
    base = net.make().eval()
    model = tunerkit.get_peft_model(base, KINDS[kind](net.targets), "own0")
    for number in range(THREADS):
        if number:
            model.add_adapter(f"own{number}", KINDS[kind](net.targets, number))
        move(model, f"own{number}", seed=number)
    return model.eval()


def others(net, folder):
    """Save adapters of both methods, with other layers and other entries than those that serve."""
    configs = [lora(net.targets), ia3(net.more), LoraConfig(r=3, use_dora=True, target_modules=list(net.more))]
    for number, config in enumerate(configs):
        model = tunerkit.get_peft_model(net.make(), config)
        move(model, "default", seed=100 + number)
        model.save_pretrained(folder / str(number))
    broken = folder / "broken"
    model.save_pretrained(broken)
    tunerkit.get_peft_model(net.make(), lora(net.targets)).save_pretrained(folder / "short")
    (folder / "short" / "adapter_model.safetensors").replace(broken / "adapter_model.safetensors")
    return [folder / str(number) for number in range(len(configs))], broken


class Caller:
    """Calls the model with its own adapter: for all rows of the batch, or for two of four."""

    def __init__(self, net, model, number):
        self.net, self.model = net, model
        self.name, self.by_rows = f"own{number}", number % 2 == 1
        self.x = torch.randn(net.shape, generator=torch.Generator().manual_seed(number))
        neighbour = f"own{(number + 1) % THREADS}"
        self.rows = [self.name, BASE, neighbour, self.name] if self.by_rows else [self.name] * 4
        self.wanted = [self._row_by_row(with_gradient) for with_gradient in (False, True)]

    def _row_by_row(self, with_gradient):
        found = []
        for row, name in zip(self.x.split(1), self.rows, strict=True):
            with self.model.use_adapter([] if name == BASE else name):
                found.append(self._run(row, with_gradient))
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _run(self, x, with_gradient, **names):
        x = x.detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            y = self.net.run(self.model, x, **names)
            if not with_gradient:
                return [y]
            return [y.detach(), *torch.autograd.grad(y.square().sum(), x)]

    def call(self, with_gradient):
        if self.by_rows:
            return self._run(self.x, with_gradient, adapter_names=self.rows)
        with self.model.use_adapter(self.name):
            return self._run(self.x, with_gradient)

    def is_right(self, number):
        """Make a call, every other with a backward; return whether all that came out is right."""
        wanted = self.wanted[number % 2]
        found = self.call(bool(number % 2))
        return all(difference(a, b) < 1e-5 * max(1, b.abs().max()) for a, b in zip(found, wanted, strict=True))


def churn(model, folders, broken, done):
    """Load and delete adapters until the others are done; return how many were loaded."""
    count = 0
    while not done.is_set() or count < 4:
        name = f"other{count % 2}"
        if name in model.peft_config:
            model.delete_adapter(name)
        model.load_adapter(folders[count % len(folders)], name)
        with pytest.raises(CheckpointError):
            model.load_adapter(broken, "broken")
        count += 1
    return count


@pytest.fixture
def hasty():
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCHES)
    yield
    sys.setswitchinterval(before)


def serve(net, kind, calls, folder):
    """Return how many calls were right, and how many adapters were loaded meanwhile."""
    model = served(net, kind)
    folders, broken = others(net, folder)
    callers = [Caller(net, model, number) for number in range(THREADS)]
    plain = [caller.wanted[0][0][:1] for caller in callers]
    with model.disable_adapter():
        assert all(difference(y, net.run(model, caller.x[:1])) > 1e-3 for y, caller in zip(plain, callers, strict=True))
    right, loaded, errors = [], [], []
    done, start = threading.Event(), threading.Barrier(THREADS + 1)

    def guard(work):
        try:
            start.wait()
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            errors.append("".join(traceback.format_exception(error)))

    def call(caller):
        right.extend(caller.is_right(number) for number in range(calls))

    threads = [threading.Thread(target=guard, args=(lambda caller=caller: call(caller),)) for caller in callers]
    loading = threading.Thread(target=guard, args=(lambda: loaded.append(churn(model, folders, broken, done)),))
    for thread in (*threads, loading):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    loading.join()
    assert errors == [], errors[0]
    assert not model.get_base_model()._forward_hooks
    return sum(right), loaded[0]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", [Perceptron, Llama])
class TestServing:
    def test_every_output_is_right(self, net, kind, tmp_path):
        right, loaded = serve(net, kind, 30, tmp_path)
        assert right == THREADS * 30
        assert loaded > 1

    @pytest.mark.long
    def test_every_output_of_thousands_is_right(self, net, kind, tmp_path):
        right, loaded = serve(net, kind, 300, tmp_path)
        print(net.__name__, kind, f"{right} of {THREADS * 300} right, {loaded} adapters loaded")  # noqa: T201
        assert right == THREADS * 300
        assert loaded > 10
