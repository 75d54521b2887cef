"""What is seen of torch's wrappers, in a group of one process; `tests/distributed` trains in several."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from toys import bare, registered

from tunerkit import get_peft_model, get_peft_model_state_dict, processes, set_peft_model_state_dict
from tunerkit.errors import AdapterStateError
from tunerkit.testing.bench import move

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="torch was built without gloo"
)
INPUT = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture(autouse=True)
def group():
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    with registered(bare):
        yield
    distributed.destroy_process_group()


def make():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(base, bare.Config(target_modules=["0"]), "a")
    model.add_adapter("b", bare.Config(target_modules=["0", "1"]))
    for name in ("a", "b"):
        move(model, name)
    return model


def backward(ddp):
    ddp(INPUT).square().sum().backward()


class TestDistributedDataParallel:
    def test_what_trained_when_it_was_made_may_train(self):
        model = make()
        backward(DistributedDataParallel(model))
        assert model.base_model.model[0].toy_down["a"].weight.grad.abs().max() > 0

    def test_what_did_not_is_refused(self):
        model = make()
        ddp = DistributedDataParallel(model)
        backward(ddp)
        model.set_adapter("b")
        with torch.no_grad():
            ddp(INPUT)
        with pytest.raises(
            AdapterStateError, match=r"0\.toy_down\.b.* and 2 more trains and did not when .*DistributedDataParallel\("
        ):
            ddp(INPUT)
        model.set_adapter("a")
        backward(ddp)

    def test_what_is_left_out_on_purpose_is_not(self):
        model = make()
        others = [name for name, _ in model.named_parameters() if ".b." in name]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)
        ddp = DistributedDataParallel(model)
        model.base_model.set_requires_grad("b")
        backward(ddp)

    def test_what_trains_on_some_processes_only_is_refused(self, monkeypatch):
        def gather(everywhere, names, group):
            everywhere[:] = [names[1:]]

        monkeypatch.setattr(distributed, "all_gather_object", gather)
        ddp = DistributedDataParallel(make())
        with pytest.raises(AdapterStateError, match=r"0\.toy_down\.a.* does not train on all processes.*same names"):
            ddp(INPUT)

    def test_torch_shows_what_is_looked_at(self):
        """Where it no longer does, there is another way to find, or the check is lost (see the next two)."""
        ddp = DistributedDataParallel(make())
        assert DistributedDataParallel._active_ddp_module is None
        [bucket] = ddp.reducer._get_zeros_like_grad_buckets()
        assert len(bucket.parameters()) == 2

    def test_a_torch_that_shows_no_gradients(self, monkeypatch):
        model = make()
        ddp = DistributedDataParallel(model)
        monkeypatch.setattr(processes, "_AVERAGED", {})
        reducer = ddp.reducer
        shown = {name: getattr(reducer, name) for name in ("prepare_for_forward", "prepare_for_backward")}
        ddp.reducer = SimpleNamespace(**shown, _rebuild_buckets=reducer._rebuild_buckets)
        backward(ddp)
        model.set_adapter("b")
        with pytest.raises(AdapterStateError, match="trains and did not when DistributedDataParallel was made"):
            ddp(INPUT)

    def test_a_torch_that_shows_no_wrapper(self, monkeypatch):
        model = make()
        ddp = DistributedDataParallel(model)
        monkeypatch.setattr(processes, "DistributedDataParallel", SimpleNamespace())
        model.set_adapter("b")
        assert ddp(INPUT).requires_grad


def sharded():
    from torch.distributed.fsdp import fully_shard

    model = make()
    for layer in model.get_base_model():
        fully_shard(layer)
    return fully_shard(model)


class TestFullyShard:
    def test_what_would_need_whole_tensors_is_refused(self, monkeypatch):
        model = sharded()
        with pytest.raises(AdapterStateError, match=r"sharded \(fully_shard\), and so on\. Do that first, then call"):
            processes.refuse_sharded(model, "so on")
        processes.refuse_sharded(make(), "so on")

    def test_what_is_sharded_by_an_older_torch(self, monkeypatch):
        import torch.distributed.fsdp as new

        kind = new.FSDPModule
        model = sharded()
        monkeypatch.delattr(new, "FSDPModule")
        monkeypatch.setitem(sys.modules, "torch.distributed._composable.fsdp", SimpleNamespace(FSDPModule=kind))
        with pytest.raises(AdapterStateError, match="and so on"):
            processes.refuse_sharded(model, "so on")

    def test_where_nothing_that_shards_is_imported(self, monkeypatch):
        model = sharded()
        for name in processes._SHARDING:
            monkeypatch.delitem(sys.modules, name, raising=False)
        processes.refuse_sharded(model, "so on")

    @pytest.mark.parametrize("older", [False, True])
    def test_tensors_are_taken_out_whole_and_put_in_by_parts(self, older, monkeypatch):
        from torch.distributed.tensor import DTensor, distribute_tensor

        model, plain = sharded(), make()
        tensors = get_peft_model_state_dict(model, adapter_name="a")
        torch.testing.assert_close(tensors, get_peft_model_state_dict(plain, adapter_name="a"))
        assert not any(processes.is_sharded(tensor) for tensor in tensors.values())
        wanted = {key: value + 1 for key, value in tensors.items()}
        with monkeypatch.context() as patch:
            if older:
                patch.setattr(DTensor, "__module__", "older")
                patch.setitem(sys.modules, "older", SimpleNamespace(distribute_tensor=distribute_tensor))
            assert set_peft_model_state_dict(model, wanted, "a").complete
        assert set_peft_model_state_dict(plain, wanted, "a").complete
        own = model.base_model.model[0].toy_down["a"].weight
        assert isinstance(own, DTensor)
        torch.testing.assert_close(processes.whole(own.detach()), wanted["base_model.model.0.toy_down.weight"])
