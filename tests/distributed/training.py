"""Trains in processes that torchrun started, `training.py WHAT FOLDER`; fails if what is to hold does not hold."""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tunerkit import get_peft_model, get_peft_model_state_dict
from tunerkit.checkpoint.files import read_tensors
from tunerkit.errors import AdapterStateError
from tunerkit_lora import LoraConfig

ADAPTERS = ("a", "b")


def config():
    return LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)


def make(trained="a"):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), config(), adapter_name="a")
    model.add_adapter("b", config())
    for name in trained:
        model.base_model.set_requires_grad(name)
    return model


def rank():
    return distributed.get_rank()


def batch(number, who):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * number + who))


def backward(ddp, number, **kwargs):
    ddp(batch(number, rank()), **kwargs).square().sum().backward()


def step(ddp, number, **kwargs):
    """Do one step of SGD with whatever trains now."""
    backward(ddp, number, **kwargs)
    update(ddp)


def update(model):
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.zero_grad()


def state(model):
    return {name: get_peft_model_state_dict(model, adapter_name=name) for name in model.peft_config}


def assert_in_step(model, *changed):
    """Assert that all ranks have the same adapters, and that these differ from those of a new model."""
    for adapter, tensors in state(model).items():
        for key, tensor in tensors.items():
            found = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
            distributed.all_gather(found, tensor)
            assert all(torch.equal(other, tensor) for other in found), (adapter, key)
    before = state(make())
    for adapter in changed:
        key = "base_model.model.0.lora_B.weight"
        assert (state(model)[adapter][key] - before[adapter][key]).abs().max() > 1e-3


def in_step(folder):
    # One adapter trains; several backwards to a step; the base model's output within a step.
    for options in ({}, {"static_graph": True}):
        model = make()
        ddp = DistributedDataParallel(model, **options)
        for number in range(3):
            step(ddp, number)
        assert_in_step(model, "a")
    model = make()
    ddp = DistributedDataParallel(model)
    for number in range(3):
        with ddp.no_sync():
            backward(ddp, 2 * number)
        step(ddp, 2 * number + 1)
        with torch.no_grad(), model.disable_adapter():
            reference = ddp(batch(number, rank()))
        (ddp(batch(number, rank())) - reference).square().sum().backward()
        update(model)
    assert_in_step(model, "a")
    # Switched and added, and wrapped anew.
    model.set_adapter("b")
    step(DistributedDataParallel(model), 1)
    torch.manual_seed(rank())
    model.add_adapter("c", config())
    model.set_adapter("c")
    ddp = DistributedDataParallel(model)
    step(ddp, 2)
    model.save_pretrained(folder, selected_adapters=["c"], is_main_process=rank() == 0)
    distributed.barrier()
    model.load_adapter(f"{folder}/c", "d", is_trainable=True)
    model.set_adapter("d")
    step(DistributedDataParallel(model), 3)
    assert_in_step(model, "a", "b")


def unused(folder):
    # All that will train does so when the model is wrapped: then adapters may be switched, also by rank.
    for kind in ("set", "use", "rows"):
        model = make(trained=ADAPTERS)
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        for number in range(4):
            name = ADAPTERS[number % 2 if kind == "set" else rank()]
            if kind == "set":
                model.set_adapter(name)
            with model.use_adapter(name) if kind == "use" else nullcontext():
                step(ddp, number, **({"adapter_names": [name] * 4} if kind == "rows" else {}))
        assert_in_step(model, "a", "b")


def switched(folder):
    model = make()
    ddp = DistributedDataParallel(model)
    step(ddp, 0)
    model.set_adapter("b")
    with torch.no_grad():
        ddp(batch(1, rank()))
    with pytest.raises(AdapterStateError, match=r"lora_A\.b.*would not be averaged.*DistributedDataParallel\(model\)"):
        step(ddp, 1)
    model.set_adapter("a")
    step(ddp, 1)
    model.add_adapter("c", config())
    model.set_adapter("c")
    with pytest.raises(AdapterStateError, match=r"lora_A\.c.*would not be averaged"):
        step(ddp, 2)
    assert_in_step(model, "a")


def differing(folder):
    model = make()
    model.set_adapter(ADAPTERS[rank()])
    ddp = DistributedDataParallel(model)
    with pytest.raises(AdapterStateError, match=r"does not train on all processes.*same names on every process"):
        step(ddp, 0)


def idle(folder):
    model = make(trained=ADAPTERS)
    ddp = DistributedDataParallel(model)
    step(ddp, 0)
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        step(ddp, 1)


def refused(folder):
    switched(folder)
    differing(folder)
    idle(folder)


def by_rank(folder):
    # The others wait for the one that has failed: torchrun ends them.
    model = make()
    ddp = DistributedDataParallel(model)
    step(ddp, 0)
    model.set_adapter(ADAPTERS[rank()])
    step(ddp, 1)


def sharded(trained="a"):
    model = make(trained)
    for layer in model.get_base_model():
        fully_shard(layer)
    return fully_shard(model)


def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        # The whole batch on every rank: the mean over the ranks is what one process has.
        model(batch(0, 0)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def fsdp(folder):
    plain, model = train(make()), train(sharded())
    torch.testing.assert_close(model(batch(1, 0)), plain(batch(1, 0)))
    torch.testing.assert_close(state(model), state(plain))
    assert (state(plain)["b"]["base_model.model.0.lora_B.weight"]).abs().max() > 1e-3
    model.save_pretrained(folder, is_main_process=rank() == 0)
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/dcp")
    distributed.barrier()
    for name in ADAPTERS:
        torch.testing.assert_close(read_tensors(f"{folder}/{name}"), state(plain)[name])
    loaded = sharded()
    for name in ADAPTERS:
        loaded.load_adapter(f"{folder}/{name}", name, is_trainable=True)
    loaded.set_adapter("a")
    torch.testing.assert_close(loaded(batch(1, 0)), plain(batch(1, 0)))
    refused = {
        "no adapter can be put in": lambda: model.add_adapter("c", config()),
        "no adapter can be merged": model.merge_adapter,
        "no layer can be taken out": lambda: model.delete_adapter("b"),
        "no layer can be taken out of": model.unload,
        "can be merged": model.merge_and_unload,
    }
    for message, call in refused.items():
        with pytest.raises(AdapterStateError, match=f"sharded.*{message}.*then call fully_shard"):
            call()
    torch.testing.assert_close(model(batch(1, 0)), plain(batch(1, 0)))


def reload(folder):
    model = sharded()
    held = {"model": get_model_state_dict(model)}
    checkpoint.load(held, checkpoint_id=f"{folder}/dcp")
    set_model_state_dict(model, held["model"])
    torch.testing.assert_close(state(model), state(train(make())))


def leave():
    """End the group when all of its processes are done: one that is waited for must not be gone."""
    distributed.barrier()
    distributed.destroy_process_group()


def reload_alone(folder):
    """Load in one process what two have saved."""
    fsdp(folder)
    first = rank() == 0
    leave()
    if first:
        distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
        reload(folder)


if __name__ == "__main__":
    # In-place operations on the output of a sharded module would be wrong; there are none here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    globals()[sys.argv[1]](sys.argv[2])
    if distributed.is_initialized():
        leave()
