"""Every setting that changes what an adapter is, with every call; and two such adapters side by side.

A call either does what it says, as the invariants below have it, or is refused with an error of ours that leaves the
model as it was. Which pairs are refused stands in `REFUSED`, and nothing else is.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import types
import warnings

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit import PeftModel, get_peft_model, hotswap_adapter, inject_adapter_in_model
from tunerkit.errors import TunerkitError, TunerkitWarning
from tunerkit.layer import tuner_layers
from tunerkit.testing.bench import Snapshot, same_bits
from tunerkit.testing.models import Mixture, Recomputed
from tunerkit_lora import LoraConfig, LoraRuntimeConfig, rescale_adapter_scale

IDS = torch.arange(12).reshape(3, 4) % 11
WIDTH = 6


class Block(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.low, self.high = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH, bias=False)
        self.norm, self.experts, self.layer_idx = nn.LayerNorm(WIDTH), Mixture(), number

    def forward(self, x):
        x = x + self.high(torch.tanh(self.low(self.norm(x))))
        return x + torch.tanh(self.experts(x))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(11, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Block(number) for number in range(2))

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Words(nn.Module):
    """A language model in small: tied embeddings, layers that can be repeated, biases, norms and experts."""

    def __init__(self):
        super().__init__()
        self.model, self.lm_head = Inner(), nn.Linear(WIDTH, 11, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        self.config = types.SimpleNamespace(num_hidden_layers=2, tie_word_embeddings=True)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids):
        return self.lm_head(self.model(input_ids))


def lora(*targets, **settings):
    return LoraConfig(target_modules=list(targets or ("low", "high")), **{"r": 2, "lora_alpha": 3, **settings})


def ia3(**settings):
    method = pytest.importorskip("tunerkit_ia3", reason="a second method to mix with: tunerkit-ia3")
    return method.IA3Config(target_modules=["low", "high"], feedforward_modules=["high"], **settings)


REPEATED = {"layer_replication": [(0, 2), (1, 2)]}
OPTIONS = {
    "plain": lora,
    "bias='all'": lambda: lora(bias="all"),
    "bias='lora_only'": lambda: lora(bias="lora_only"),
    "lora_bias": lambda: lora(lora_bias=True),
    "use_dora": lambda: lora("low", "embed_tokens", use_dora=True),
    "use_rslora": lambda: lora(use_rslora=True),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head", "model.norm"]),
    "target_parameters": lambda: lora(target_parameters=["experts.up", "experts.down"]),
    "layer_replication": lambda: lora(**REPEATED),
    "tied targets": lambda: lora("low", "embed_tokens", ensure_weight_tying=True),
    "tied copies": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "an embedding": lambda: lora("low", "embed_tokens"),
    "the head": lambda: lora("low", "lm_head"),
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "no start": lambda: lora(init_lora_weights=False),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "pissa_niter": lambda: lora(init_lora_weights="pissa_niter_4"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "loftq": lambda: lora(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "eva": lambda: lora(init_lora_weights="eva"),
    "mica": lambda: lora(init_lora_weights="mica"),
    "patterns": lambda: lora(rank_pattern={"low": 4}, alpha_pattern={"high": 7}),
    "fan_in_fan_out": lambda: lora(fan_in_fan_out=True),
    "lora_dropout": lambda: lora(lora_dropout=0.5),
    "runtime_config": lambda: lora(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True)),
    "ia3": ia3,
    "ia3 and modules_to_save": lambda: ia3(modules_to_save=["lm_head"]),
}
BIASES = ("bias='all'", "bias='lora_only'")
FIRSTS = (
    "plain", "bias='all'", "use_dora", "modules_to_save", "target_parameters", "layer_replication", "tied targets"
)  # fmt: skip
SECONDS = ("plain", "bias='all'", "modules_to_save", "target_parameters", "ia3")


def output(model, **rows):
    with torch.no_grad():
        return model(IDS, **rows)


def close(one, other, limit=1e-4):
    return float((one.float() - other.float()).abs().max()) <= limit * max(1.0, float(other.float().abs().max()))


class World:
    """A base model, an adapter `one` with some option, and for a pair another, `two`; all of their numbers moved."""

    def __init__(self, first, second=None):
        self.first, self.second = first, second
        self.lossy = first == "pissa_niter"  # it is saved as another adapter, see docs/differences.md

    def base(self):
        torch.manual_seed(0)
        return Words().eval()

    def same(self, found, expected):
        return close(found, expected) if self.lossy else same_bits(found, expected)

    def one(self, base=None, seed=0):
        base = self.base() if base is None else base
        plain = output(base)
        torch.manual_seed(3)
        model = get_peft_model(base, OPTIONS[self.first](), "one").eval()
        move(model, "one", seed)
        assert (output(model) - plain).abs().max() > 1e-3
        return model

    def two(self, base=None):
        model = self.one(base)
        before = output(model)
        guarded(model, model.add_adapter, "two", OPTIONS[self.second]())
        move(model.eval(), "two", 5)
        assert same_bits(output(model), before)
        return model


def move(model, name, seed):
    generator = torch.Generator().manual_seed(seed)
    biases = model.base_model.biases
    tensors = [t for _, layer in tuner_layers(model.get_base_model()) for t in layer.adapter_tensors(name).values()]
    if biases.name == name:
        tensors += biases.parameters() if biases.shown else biases.kept
    for tensor in {id(tensor): tensor for tensor in tensors if tensor.is_leaf}.values():
        tensor.data.add_(0.3 * torch.randn(tensor.shape, generator=generator).to(tensor))


class RefusedError(Exception):
    """A call was refused with an error of ours, and nothing was changed."""


def guarded(model, call, *arguments, **keywords):
    """Call something that may be refused; if it is, the model is what it was."""
    before, was = Snapshot.of(model), output(model)
    try:
        return call(*arguments, **keywords)
    except TunerkitError as error:
        assert before.differences(model) == []
        assert same_bits(output(model), was)
        raise RefusedError(str(error)) from error


# One adapter


def disable(world, _):
    base = world.base()
    plain = output(base)
    model = world.one(base)
    before = output(model)
    with model.disable_adapter():
        assert same_bits(output(model), plain) or world.first == "layer_replication"
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert same_bits(output(model), before)


def take_out(world, _):
    for way in ("unload", "delete", "merge and unload"):
        base = world.base()
        before, plain = Snapshot.of(base), output(base)
        model = world.one(base)
        if way == "delete":
            model.delete_adapter("one")
            found = [line for line in before.differences(base) if "requires_grad" not in line]
        else:
            if way == "merge and unload":
                model.merge_adapter()
            assert model.unload() is base
            found = before.differences(base)
        assert found == []
        assert same_bits(output(base), plain)


def merge(world, _):
    for safe in (False, True):
        model = world.one()
        with model.disable_adapter():
            plain = output(model)
        before, was = Snapshot.of(model), output(model)
        model.merge_adapter(safe_merge=safe)
        folded = output(model)
        assert close(folded, was)
        with model.disable_adapter():
            assert same_bits(output(model), plain)
        assert same_bits(output(model), folded)
        model.unmerge_adapter()
        assert before.differences(model) == []
        assert same_bits(output(model), was)
        base = model.merge_and_unload(safe_merge=safe)
        assert not list(tuner_layers(base))
        assert close(output(base), was)


def save(world, folder):
    model = world.one()
    before, was = Snapshot.of(model), output(model)
    model.save_pretrained(folder)
    assert before.differences(model) == []
    model.merge_adapter()
    model.save_pretrained(folder / "merged")
    model.unmerge_adapter()
    with model.disable_adapter():
        model.save_pretrained(folder / "disabled")
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for path in (folder, folder / "merged", folder / "disabled"):
        loaded = PeftModel.from_pretrained(world.base(), path / "one", "one")
        assert world.same(output(loaded), was)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for keywords in ({"low_cpu_mem_usage": True}, {"strict": False}):
        loaded = PeftModel.from_pretrained(world.base(), folder / "one", "one", is_trainable=True, **keywords)
        assert world.same(output(loaded.eval()), was)
        found = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert found == trains
    model.save_pretrained(folder / "words", save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(world.base(), folder / "words" / "one")
    assert world.same(output(loaded), was)
    assert same_bits(output(loaded.unload()), output(world.base()))


def swap(world, folder):
    model, other = world.one(), world.one(seed=8)
    expected = output(other)
    assert not close(output(model), expected)
    other.save_pretrained(folder)
    guarded(model, hotswap_adapter, model, folder / "one", "one")
    assert same_bits(output(model), expected)
    model.merge_adapter()
    assert close(output(model), expected)


def report(world, _):
    model = world.one()
    before = Snapshot.of(model)
    status = model.get_model_status()
    assert (status.active_adapters, status.merged_adapters, status.enabled) == (["one"], [], True)
    assert status.requires_grad == {"one": True}
    assert len(model.get_layer_status()) == status.num_adapter_layers
    trains = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    assert model.get_nb_trainable_parameters()[0] == sum(trains.values())
    model.print_trainable_parameters()
    assert model.base_model.targeted_module_names
    assert tunerkit.plan(model, lora()).targets
    assert before.differences(model) == []
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def gradients(model, called):
    model.zero_grad()
    called(IDS).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpoint(world, _):
    model = world.one()
    expected = gradients(model, model)
    assert expected.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for reentrant in (False, True):
        found = gradients(model, Recomputed(model, use_reentrant=reentrant))
        assert found.keys() == expected.keys()
        assert all(close(found[name], expected[name], 1e-5) for name in found)


def train(world, folder):
    base = world.base()
    plain = output(base)
    model = world.one(base)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trains = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.Adam(trains.values(), 0.05)
    for _ in range(2):
        gradients(model.train(), model)
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trains.keys()
    trained = output(model.eval())
    model.save_pretrained(folder)
    assert world.same(output(PeftModel.from_pretrained(world.base(), folder / "one")), trained)
    assert same_bits(output(model.unload()), plain)


def duplicate(world, _):
    model = world.one()
    was, plain = output(model), output(world.base())
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),  # noqa: S301 - what was just written
        torch.load(stream, weights_only=False),
    ):
        assert same_bits(output(other), was)
        assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in other.parameters())
        move(other, "one", 4)
        other.merge_adapter()
        other.unmerge_adapter()
        assert same_bits(output(other.unload()), plain)
    assert same_bits(output(model), was)
    model.merge_adapter()
    other = copy.deepcopy(model)
    other.unmerge_adapter()
    assert same_bits(output(other), was)


def state(world, _):
    model, other = world.one(), world.one(seed=8)
    tensors = tunerkit.get_peft_model_state_dict(model, adapter_name="one")
    report = tunerkit.set_peft_model_state_dict(other, tensors, adapter_name="one")
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert close(output(other), output(model)) or world.lossy
    other = world.one(seed=8)
    other.load_state_dict(model.state_dict())
    assert same_bits(output(other), output(model)) or world.lossy
    own, base = tunerkit.get_base_model_state_dict(model), world.base().state_dict()
    assert all(torch.equal(own[key], value) for key, value in base.items())


def precision(world, folder):
    base = world.base().bfloat16()
    plain = output(base)
    model = world.one(base)
    was = output(model)
    assert was.dtype == torch.bfloat16
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(world.base().bfloat16(), folder / "one", low_cpu_mem_usage=True)
    assert close(output(loaded), was, 0.05)
    model.merge_adapter()
    assert close(output(model), was, 0.05)
    model.unmerge_adapter()
    assert same_bits(output(model.unload()), plain)


def inject(world, _):
    model, base = world.one(), world.base()
    guarded(base, inject_adapter_in_model, OPTIONS[world.first](), base, "one")
    if not world.lossy:
        tunerkit.set_peft_model_state_dict(base, tunerkit.get_peft_model_state_dict(model, adapter_name="one"), "one")
        assert same_bits(output(base), output(model))
    tunerkit.delete_adapter(base, "one")
    assert same_bits(output(base), output(world.base()))


def rescale(world, _):
    model = world.one()
    was = output(model)
    before = Snapshot.of(model)

    def halved():
        with rescale_adapter_scale(model, 0.5):
            return output(model)

    assert not close(guarded(model, halved), was)
    assert before.differences(model) == []
    assert same_bits(output(model), was)


ALONE = (disable, take_out, merge, save, swap, report, checkpoint, train, duplicate, state, precision, inject, rescale)


# Two adapters


def switch(world, _):
    model = world.two()
    one = output(model)
    model.set_adapter("two")
    two = output(model)
    assert not close(two, one)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains
    assert not any("one" in name.split(".") for name in trains)
    model.set_adapter("one")
    assert same_bits(output(model), one)
    with model.disable_adapter():
        plain = output(model)
        model.set_adapter("two")
        assert same_bits(output(model), plain)
    assert same_bits(output(model), two)


def together(world, _):
    model = world.two()
    one = output(model)
    guarded(model, model.set_adapter, ["one", "two"])
    both = output(model)
    assert not close(both, one)
    guarded(model, model.merge_adapter)
    assert close(output(model), both)
    model.unmerge_adapter()
    assert same_bits(output(model), both)
    model.set_adapter("one")
    assert same_bits(output(model), one)


def rows(world, _):
    model = world.two()
    expected = [output(model)]
    with model.disable_adapter():
        expected.append(output(model))
    model.set_adapter("two")
    expected.append(output(model))
    model.set_adapter("one")
    names = ["one", "__base__", "two"]
    for training in (False, True):
        model.train(training)
        found = guarded(model, output, model, adapter_names=names)
        dropped = training and "lora_dropout" in (world.first, world.second)
        assert dropped or all(close(found[row], expected[row][row]) for row in range(3))
        model(IDS, adapter_names=names).sum().backward()
    assert same_bits(output(model.eval()), expected[0])
    with model.use_adapter("two"):
        assert same_bits(output(model), expected[2])


def beside_merged(world, _):
    model = world.one()
    one = output(model)
    model.merge_adapter()
    folded = output(model)
    try:
        guarded(model, model.add_adapter, "two", OPTIONS[world.second]())
    finally:
        assert same_bits(output(model), folded)
    move(model.eval(), "two", 5)
    assert same_bits(output(model), folded)
    with pytest.raises(RefusedError, match="The adapter 'one' is merged"):
        guarded(model, model.delete_adapter, "one")
    model.set_adapter("two")
    two = output(model)
    model.set_adapter("one")
    assert same_bits(output(model), one)
    merged = model.merge_and_unload(adapter_names=["one"])
    assert close(output(merged), one)
    assert not close(two, one)


def delete(world, _):
    base = world.base()
    model = world.two(base)
    one = output(model)
    model.set_adapter("two")
    two = output(model)
    other = copy.deepcopy(model)
    other.set_adapter("one")
    other.delete_adapter("two")
    assert same_bits(output(other), one)
    model.delete_adapter("one")
    assert same_bits(output(model), two)
    model.delete_adapter("two")
    assert same_bits(output(base), output(world.base()))
    assert same_bits(output(other.unload()), output(world.base()))


def save_both(world, folder):
    model = world.two()
    one = output(model)
    model.set_adapter("two")
    two = output(model)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(world.base(), folder / "one", "one")
    loaded.load_adapter(folder / "two", "two")
    assert world.same(output(loaded), one)
    loaded.set_adapter("two")
    assert same_bits(output(loaded), two)
    move(model, "two", 9)
    model.load_adapter(folder / "two", "two")
    assert same_bits(output(model), two)


def combine(world, folder):
    model = world.two()
    one = output(model)
    for kind in ("linear", "svd", "cat", "ties"):
        guarded(
            model,
            lambda kind=kind: model.add_weighted_adapter(
                ["one", "two"], [0.5, 0.7], kind, combination_type=kind, density=0.9
            ),
        )
        assert same_bits(output(model), one)
        model.set_adapter(kind)
        combined = output(model)
        model.save_pretrained(folder, selected_adapters=[kind])
        if world.first != "layer_replication":
            assert same_bits(output(PeftModel.from_pretrained(world.base(), folder / kind)), combined)
        model.set_adapter("one")
        model.delete_adapter(kind)
        assert same_bits(output(model), one)


BESIDE = (switch, together, rows, beside_merged, delete, save_both, combine)

# What is refused


def refusal(call, first, second=None):
    """Return what a refusal says, or None where the call is to do what it says."""
    if second is None:
        found = {
            swap: {"pissa_niter": "is a LoraAdapter there and a AnchoredLora here"},
            inject: dict.fromkeys(BIASES, "bias="),
            rescale: dict.fromkeys(("ia3", "ia3 and modules_to_save"), "holds no LoRA adapter"),
        }
        return found.get(call, {}).get(first)
    pair = (first, second)
    if pair == ("bias='all'", "bias='all'"):
        return "so only one adapter at a time can"
    if pair == ("tied targets", "modules_to_save"):
        return "has adapters already"
    if call is rows:
        return "Calls cannot be routed" if "bias='all'" in pair else None
    if call is together:
        return "cannot be active together" if pair == ("modules_to_save", "modules_to_save") else None
    return not_combined(first, second) if call is combine else None


def not_combined(first, second):
    """Return why two adapters cannot be made one, or None if they can."""
    if second == "ia3":
        return "is offered by adapters of several methods"
    if first == "use_dora":
        return "learns magnitudes (use_dora=True)"
    for option in (first, second):
        if option in ("bias='all'", "target_parameters"):
            return option.partition("=")[0]
    return "each hold a ModulesToSaveWrapper" if first == second == "modules_to_save" else None


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TunerkitWarning)
        yield


def check(call, world, folder, expected):
    if expected is None:
        call(world, folder)
    else:
        with pytest.raises(RefusedError, match=re.escape(expected)):
            call(world, folder)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("call", ALONE, ids=lambda call: call.__name__)
def test_alone(call, option, tmp_path):
    check(call, World(option), tmp_path, refusal(call, option))


@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("call", BESIDE, ids=lambda call: call.__name__)
def test_beside(call, first, second, tmp_path):
    check(call, World(first, second), tmp_path, refusal(call, first, second))
