"""Batches in which each row has an adapter of its own."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint
from toys import bottleneck, hooks_by_hand, parameters, registered, rotation, shared

from tunerkit import get_peft_model, inject_adapter_in_model, use_rows
from tunerkit.adapter import Adapter, Part
from tunerkit.alike import _alike, run_alike, run_each
from tunerkit.errors import AdapterNameError, ConfigError, RouteError, UnknownAdapterError
from tunerkit.rows import BASE, Groups, Rows, rows_of, split_rows
from tunerkit.sites import make_site
from tunerkit.testing.bench import Snapshot, difference, move
from tunerkit.testing.models import SAMPLES
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

ROWS = ["b", BASE, "a", "b", "c"]


def make(*configs, base=None, targets=("0", "2"), names="abc"):
    """Return a model with adapters that have all been moved."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)) if base is None else base
    for config in configs:
        if config.target_modules is None and getattr(config, "target_parameters", None) is None:
            config.target_modules = list(targets)
    model = get_peft_model(base, configs[0], names[0])
    for name, config in zip(names[1:], configs[1:], strict=False):
        model.add_adapter(name, config)
    for number, name in enumerate(model.peft_config):
        move(model, name, seed=number)
    return model.eval()


def loras():
    return [LoraConfig(r=2), LoraConfig(r=3, lora_alpha=5), LoraConfig(r=2)]


def ia3s():
    return [IA3Config(feedforward_modules=["2"]) for _ in range(3)]


def one_by_one(model, x, rows):
    outputs = []
    for row, name in enumerate(rows):
        with model.use_adapter([] if name == BASE else name):
            outputs.append(model(x[row : row + 1]))
    return torch.cat(outputs)


def check(model, x, rows=ROWS):
    with torch.no_grad():
        expected = one_by_one(model, x, rows)
        assert difference(expected, model(x)) > 1e-3
        assert difference(model(x, adapter_names=rows), expected) < 1e-5


def message_of(error, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def model():
    return make(*loras())


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


class TestGroups:
    def test_rows_of_groups(self):
        groups = Groups.of(["b", "a", "b", "c", "a", "b"])
        assert (groups.names, groups.sizes) == (("a", "b", "c"), (2, 3, 1))
        cpu = torch.device("cpu")
        assert groups.rows((0, 2), cpu).tolist() == [1, 4, 3]
        assert groups.rows((0, 1), cpu, 3).tolist() == [1, 4, 4, 0, 2, 5]
        assert groups.position_of_rows(cpu).tolist() == [1, 0, 1, 2, 0, 1]
        part = groups.only((2, 0))
        assert (part.names, part.sizes, part.order.tolist()) == (("c", "a"), (1, 2), [0, 1, 2])
        assert groups.only((2, 0)) is part

    @pytest.mark.parametrize("sizes", [[0, 0], [4, 0]], ids=["as they are", "filled up"])
    def test_joining_puts_rows_back(self, sizes):
        groups = Groups.of(["b", "a", "b", "c", "a", "b"])
        x, cpu = torch.arange(12).view(6, 2), torch.device("cpu")
        parts = [(1, 0), (2,)]
        outputs = [x[groups.rows(part, cpu, size)] for part, size in zip(parts, sizes, strict=True)]
        assert torch.equal(groups.join(parts, sizes, outputs), x)
        doubled = groups.join(parts, sizes, [(out, [None, 2 * out]) for out in outputs])
        assert torch.equal(doubled[0], x)
        assert doubled[1][0] is None
        assert torch.equal(doubled[1][1], 2 * x)

    def test_output_that_has_no_rows(self):
        groups = Groups.of(["a", "b"])
        with pytest.raises(RouteError, match="where a layer puts out a str"):
            groups.join([(0,), (1,)], [0, 0], ["one", "two"])

    def test_splitting(self):
        x = torch.arange(8.0).view(4, 2)
        seen = []

        def run(name, part):
            seen.append((name, len(part)))
            return part * {"a": 2, BASE: 1}[name]

        y = split_rows(x, Groups.of(["a", BASE, BASE, "a"]), run)
        assert torch.equal(y, x * torch.tensor([[2], [1], [1], [2]]))
        assert seen == [(BASE, 2), ("a", 2)]
        assert split_rows(x, Groups.of(["a"] * 4), lambda name, part: part) is x

    def test_an_index_made_without_gradients_serves_a_backward(self, model, x):
        with model.use_rows(ROWS):
            with torch.inference_mode():
                model(x)
            model(x).sum().backward()
        assert model.base_model.model[0].lora_B["a"].weight.grad is not None
        with torch.inference_mode():
            rows = Rows(ROWS)
        assert not rows.groups(x, "").order.is_inference()

    def test_known_names_are_sorted_once(self):
        rows = rows_of(["a", "b"])
        assert rows_of(("a", "b")) is rows == Rows(["a", "b"])
        assert rows_of(["b", "a"]) != rows != rows_of(["a", "b"], 2)

    def test_fake_tensors_stay_within_their_mode(self):
        x, names = torch.ones(3, 1), ["known", "new", "known"]
        for _ in range(2):
            with FakeTensorMode() as mode:
                assert isinstance(rows_of(names).groups(mode.from_tensor(x), "").order, FakeTensor)
            assert type(rows_of(names).groups(x, "").order) is torch.Tensor

    def test_equality_is_that_of_the_names(self):
        assert Rows(["a", "b"]) == Rows(("a", "b")) != Rows(["a", "b"], 2)
        assert len({Rows(["a"]), Rows(["a"]), Rows(["b"])}) == 2
        assert repr(Rows(["a", "b"], 3)) == "Rows(['a', 'b'], repeats=3)"


class TestForward:
    @pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6), (5, 2, 3, 6)])
    @pytest.mark.parametrize("configs", [loras, ia3s])
    def test_each_row_has_its_adapter(self, configs, shape):
        check(make(*configs()), torch.randn(*shape))

    def test_methods_together(self, x):
        with registered(rotation, bottleneck):
            model = make(LoraConfig(r=2), IA3Config(feedforward_modules=[]), rotation.Config())
            model.add_adapter("d", LoraConfig(r=3, target_modules=["0"]))
            model.add_adapter("e", bottleneck.Config(target_modules=["2"]))
            move(model, "d")
            move(model, "e")
            check(model, torch.randn(9, 6), ["e", "a", "d", "c", "d", BASE, "b", "a", "e"])

    def test_base_alone_is_the_base(self, model, x):
        with model.disable_adapter():
            plain = model(x)
        assert torch.equal(model(x, adapter_names=[BASE] * 5), plain)

    def test_nothing_on_the_model_changes(self, model, x):
        before = Snapshot.of(model)
        model(x, adapter_names=ROWS)
        assert before.differences(model) == []
        with pytest.raises(RouteError):
            model(x[:, :5], adapter_names=ROWS[:4])
        assert before.differences(model) == []

    def test_nested_routes(self, model, x):
        expected = one_by_one(model, x, ROWS)
        with model.use_adapter("b"):
            only_b = model(x)
            assert torch.allclose(model(x, adapter_names=ROWS), expected, atol=1e-6)
            assert torch.equal(model(x), only_b)
        with model.use_rows(ROWS), model.use_adapter("b"):
            assert torch.equal(model(x), only_b)

    def test_other_threads_do_not_see_it(self, model, x):
        found = []
        plain = model(x)
        with model.use_rows(ROWS):
            thread = threading.Thread(target=lambda: found.append(model(x)))
            thread.start()
            thread.join()
        assert torch.equal(found[0], plain)

    def test_injected_model(self, x):
        base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), base, "a")
        with torch.no_grad(), use_rows(base, ["a", BASE, "a", BASE, "a"]):
            plain, y = base[0].base_layer(x), base[0](x)
        assert torch.equal(y[1::2], plain[1::2])
        assert difference(y[::2], plain[::2]) > 1e-3
        assert "has no adapters" in message_of(UnknownAdapterError, use_rows, nn.Linear(2, 2), ["a"])

    def test_parameters_whose_layers_stand_on_one_another(self):
        sample = SAMPLES["parameter"]
        with registered(parameters):
            configs = [parameters.Config(target_parameters=sample.targets["target_parameters"]) for _ in range(2)]
            configs[1].target_parameters = ["experts.up"]
            check(make(*configs, base=sample(), names="ab"), sample.inputs()[0], ["a", "b", BASE, "b", "a"])

    def test_copies_of_modules(self, x):
        configs = [LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]) for _ in range(2)]
        model = make(*configs, LoraConfig(r=2, target_modules=["0"]))
        check(model, x)
        wrapper = model.get_base_model()[2]
        with model.use_rows(ROWS):
            text = message_of(RouteError, lambda: wrapper.weight)
        assert "the parameters of the layer '2' are read for the whole batch, with 'a' among the adapters" in text
        with model.use_rows(["c", BASE]):
            assert wrapper.weight is wrapper.original_module.weight

    def test_part_without_a_surrounding_of_the_call(self, x):
        with registered(shared):
            around = shared.Projections.around
            shared.Projections.around = Part.around
            try:
                check(make(*(shared.Config() for _ in range(3))), x)
            finally:
                shared.Projections.around = around

    def test_sizes_of_groups_that_differ_much(self):
        model = make(*ia3s())
        x = torch.randn(13, 6)
        check(model, x, ["a"] * 9 + ["b", "c", "b", BASE])

    def test_dropout_differs_by_row_and_adapter(self):
        for configs in (
            [LoraConfig(r=2, lora_dropout=0.5) for _ in range(3)],
            [*loras()[:2], LoraConfig(r=2, lora_dropout=0.9)],
        ):
            model = make(*configs).train()
            x = torch.ones(6, 6)
            with torch.no_grad():
                y = model(x, adapter_names=["a", "a", "b", "b", "c", "c"])
            dropping = [config.lora_dropout > 0 for config in configs]
            assert [difference(y[2 * i], y[2 * i + 1]) > 1e-3 for i in range(3)] == dropping


class Kept(Adapter):
    """Adds a number that it has as a Python number, which torch.vmap does not allow."""

    entries = ("toy_offset",)

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_offset = nn.Parameter(site.ones(1))

    def forward(self, x, below):
        return below(x) + self.toy_offset.item()


class TestAlike:
    def adapters(self, model):
        return [model.get_base_model()[0].adapters[name] for name in model.peft_config]

    def test_equal_settings_and_shapes(self):
        assert _alike(self.adapters(make(*ia3s())), [2, 2, 2]) == [(0, 1, 2)]
        assert _alike(self.adapters(make(*loras())), [2, 2, 2]) == [(0, 2), (1,)]
        assert _alike(self.adapters(make(*ia3s())), [1, 9, 16]) == [(0,), (1, 2)]

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda adapter: setattr(adapter, "is_feedforward", 0),
            lambda adapter: setattr(adapter, "more", {"x": [1, {2}]}),
            lambda adapter: adapter.train(),
            lambda adapter: adapter.double(),
            lambda adapter: adapter.register_forward_hook(print),
            lambda adapter: setattr(adapter, "note", object()),
            lambda adapter: adapter.register_buffer("more", torch.ones(1)),
            lambda adapter: adapter.add_module("more", nn.Linear(1, 1)),
            lambda adapter: adapter.add_module("more", None),
        ],
    )
    def test_what_keeps_two_apart(self, spoil):
        adapters = self.adapters(make(*ia3s()))
        spoil(adapters[1])
        assert _alike(adapters, [2, 2, 2]) == [(0, 2), (1,)]

    def test_plain_settings_are_compared_by_value(self):
        adapters = self.adapters(make(*ia3s()))
        for adapter in adapters:
            adapter.more = {"x": [1, {2}], "y": (None, "text")}
        assert _alike(adapters, [2, 2, 2]) == [(0, 1, 2)]

    @pytest.mark.parametrize("configs", [loras, ia3s, lambda: [*loras()[:1], *ia3s()[:1], *loras()[:1]]])
    def test_base_is_run_once(self, x, configs):
        model = make(*configs())
        calls = []
        model.get_base_model()[0].base_layer.register_forward_hook(lambda module, args, y: calls.append(len(y)))
        model(x, adapter_names=ROWS)
        assert calls == [5]

    @pytest.mark.parametrize("rows", [ROWS, ["a", "b", "c", "a", "b"]])
    def test_what_vmap_cannot_run_is_run_one_by_one(self, x, rows):
        model = make(*ia3s())
        layer = model.get_base_model()[0]
        for number, name in enumerate("abc"):
            adapter = Kept(layer.site, None).eval()
            adapter.toy_offset.data.fill_(number + 1.0)
            adapter.__dict__.update(_method="toy", _frozen=frozenset(), _layer_class=object)
            layer._adapters[name] = adapter
        layer._settle()
        check(model, x, rows)

    def test_run_each_gives_the_same_without_stacking(self, x, monkeypatch):
        adapters, groups = self.adapters(make(*ia3s())), Groups.of(["b", "a", "a", "b", "c"])
        site = make_site(nn.Linear(6, 8))
        expected = run_alike(adapters, x, site, groups)
        monkeypatch.setattr(torch, "stack", None)
        assert torch.allclose(run_each(adapters, x, site, groups), expected, atol=1e-6)

    def test_error_of_a_method_is_shown(self, x, monkeypatch):
        def fail(adapter, x, below):
            raise RuntimeError("on purpose")

        model = make(*ia3s())
        monkeypatch.setattr(type(self.adapters(model)[0]), "forward", fail)
        assert message_of(RuntimeError, model, x, adapter_names=ROWS) == "on purpose"

    def test_way_of_its_own_is_not_taken_for_another_forward(self, x, monkeypatch):
        model = make(*loras())
        layer = model.get_base_model()[0]
        kind = type(layer.adapters["a"])

        class Doubled(kind):
            def forward(self, x, below):
                return 2 * super().forward(x, below)

        for name in "abc":
            layer._adapters[name].__class__ = Doubled
        check(model, x)

    def test_factors_that_are_hooked_are_called(self, model, x):
        seen = []
        model.get_base_model()[0].lora_A["b"].register_forward_hook(lambda module, args, y: seen.append(len(y)))
        check(model, x)
        assert seen[-1] == 2

    def test_scales_that_are_tensors(self, model, x):
        layer = model.get_base_model()[0]
        layer._adapters["b"].scaling = torch.tensor(3.0)
        check(model, x)


class TestBackward:
    @pytest.mark.parametrize("configs", [loras, ia3s])
    def test_gradients_are_the_sum_over_the_rows(self, configs, x):
        found = []
        for whole in (True, False):
            model = make(*configs()).train()
            model.set_requires_grad(["a", "b", "c"])
            leaf = x.clone().requires_grad_()
            y = model(leaf, adapter_names=ROWS) if whole else one_by_one(model, leaf, ROWS)
            y.square().sum().backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found.append({"x": leaf.grad, **gradients})
        assert found[0].keys() == found[1].keys()
        assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_after_another_route(self, x, reentrant):
        class Recomputing(nn.Module):
            def __init__(self, inner, how):
                super().__init__()
                self.inner, self.how = inner, how

            def forward(self, x):
                if self.how is None:
                    return self.inner(x)
                return checkpoint(self.inner, x, use_reentrant=self.how)

        found = []
        for how in (None, reentrant):
            torch.manual_seed(0)
            inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
            model = make(*loras(), base=Recomputing(inner, how), targets=("inner.0", "inner.2")).train()
            model.set_requires_grad(["a", "b", "c"])
            leaf = x.clone().requires_grad_()
            y = model(leaf, adapter_names=ROWS)
            z = model(leaf, adapter_names=ROWS[::-1])
            with model.use_adapter("c"):
                (y.square().sum() + 2 * z.square().sum()).backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert len(found[0]) == 12
        assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])

    def test_part_of_the_model_by_itself(self, model, x):
        base = model.get_base_model()
        with model.use_rows(ROWS):
            text = message_of(RouteError, checkpoint, base[0], x.requires_grad_(), use_reentrant=False)
        assert text.startswith(f"A part of the model was called by itself with the adapters {ROWS}")

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_layers_below_a_layer(self, reentrant):
        sample, found = SAMPLES["parameter"], []
        with registered(parameters):
            for how in (None, reentrant):
                torch.manual_seed(0)
                configs = [parameters.Config(**copy.deepcopy(sample.targets)) for _ in range(2)]
                model = make(*configs, base=sample(), names="ab").train()
                model.set_requires_grad(["a", "b"])
                x = sample.inputs()[0].requires_grad_()
                call = model.get_base_model().experts.forward
                if how is not None:
                    model.get_base_model().experts.forward = lambda x, call=call, how=how: checkpoint(
                        call, x, use_reentrant=how
                    )
                model(x, adapter_names=["a", "b", BASE, "b", "a"]).square().sum().backward()
                found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert len(found[0]) == 12
        assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


@pytest.mark.filterwarnings("ignore")
class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("configs", [loras, ia3s])
    def test_one_graph_for_batches_with_the_same_counts(self, configs, x):
        from torch._dynamo.testing import CompileCounter

        model, counter = make(*configs()), CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for rows, graphs in ((ROWS, 1), (ROWS[::-1], 1), (["a"] * 5, 2), (ROWS, 2)):
            with model.use_rows(rows):
                assert torch.allclose(compiled(x), one_by_one(model, x, rows), atol=1e-6)
            assert counter.frame_count == graphs
        assert torch.allclose(compiled(x), model(x), atol=1e-6)

    def test_names_as_an_argument(self, model, x):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x, adapter_names=ROWS), one_by_one(model, x, ROWS), atol=1e-6)


class TestRefused:
    def test_names(self, model, x):
        text = message_of(UnknownAdapterError, model, x, adapter_names=["a", "bb", BASE, "a", "a"])
        assert text.startswith("The model has no adapter 'bb'; it has 'a', 'b', 'c'.")
        for given in ("a", [], {"a"}, ["a", 1, "a", "a", "a"], [["a"]] * 5):
            text = message_of(AdapterNameError, model, x, adapter_names=given)
            assert f"'__base__'; it is {given!r}. The model has 'a', 'b', 'c'." in text
            assert text.endswith("use use_adapter(name).")

    def test_number_of_names_is_compared_before_anything_runs(self, model, x):
        ran = []
        model.get_base_model()[0].register_forward_pre_hook(lambda *_args: ran.append(1))
        for call in (lambda: model(x, adapter_names=["a", "b"]), lambda: model(input=x, adapter_names=["a", "b"])):
            assert message_of(RouteError, call) == (
                "adapter_names has 2 names, one for each row of the batch, and the call's first tensor is of shape "
                "(5, 6). Pass 5 names."
            )
        assert ran == []

    def test_layer_whose_input_is_not_the_rows(self, x):
        class Flat(nn.Module):
            def __init__(self, wrong):
                super().__init__()
                self.lin = nn.Linear(6, 6)
                self.wrong = wrong

            def forward(self, x):
                return self.lin(self.wrong(x))

        for wrong, what in (
            (lambda x: x.flatten(0, 1), "an input of shape (10, 6)"),
            (lambda x: x[0, 0].sum(), "an input of shape ()"),
            (list, "a list"),
        ):
            model = make(*loras(), base=Flat(wrong), targets=["lin"])
            with model.use_rows(ROWS):
                text = message_of(RouteError, model, torch.randn(5, 2, 6))
            assert "Each row of the batch has an adapter of its own, 5 in all, and the layer 'lin' got " in text
            assert f"{what}, where the first dimension must be the rows: 5." in text
            assert text.endswith("call it once for each adapter, within use_adapter(name).")
        assert "must be the rows: 2 or 6." in message_of(RouteError, Rows(["a", "b"], 3).groups, x, "lin")

    def test_other_tensors_of_a_layer(self):
        sample = SAMPLES["parameter"]
        with registered(parameters):
            base = sample()
            model = make(parameters.Config(**copy.deepcopy(sample.targets)), base=base, names="a")
            x = sample.inputs()[0]
            with model.use_rows(["a"] * 5):
                text = message_of(RouteError, base.experts, x, weights=x)
        assert "the layer 'experts' takes other tensors beside its input" in text

    def test_merged(self, model, x):
        model.merge_adapter()
        text = message_of(RouteError, model, x, adapter_names=ROWS)
        assert text == "'a' is merged into the model, so calls cannot be routed. Call unmerge_adapter() first."

    def test_layer_merged_within_the_block(self, model, x):
        with model.use_rows(ROWS):
            model.get_base_model()[0].merge()
            assert "has 'a' merged into its weight" in message_of(RouteError, model, x)

    def test_switched_off(self, model, x):
        with model.disable_adapter():
            text = message_of(RouteError, model, x, adapter_names=ROWS)
            model(x, adapter_names=None)
        assert text == (
            "The adapters are switched off, so rows cannot have adapters of their own. Leave adapter_names out, or "
            "call enable_adapter_layers() first."
        )

    def test_method_that_looks_across_the_batch(self, model, x):
        model.get_base_model()[2].adapters["b"].__dict__["crosses_rows"] = "it averages over the batch"
        text = message_of(RouteError, model, x, adapter_names=ROWS)
        assert text == (
            "The adapter 'b' on '2' cannot be for some rows of a batch only: it averages over the batch. Use "
            "use_adapter('b') and a batch of its own."
        )
        model(x, adapter_names=["a", "c", BASE, "a", "a"])

    def test_attention(self):
        sample = SAMPLES["attention"]
        model = make(*(LoraConfig(r=2, **copy.deepcopy(sample.targets)) for _ in range(2)), base=sample(), names="ab")
        text = message_of(RouteError, model, *sample.inputs(), adapter_names=["a", "b", "a", "b", "a"])
        assert "torch's attention layer reads its parameters once for the whole batch" in text
        model(*sample.inputs(), adapter_names=[BASE] * 5)

    def test_part_around_the_call(self, x):
        with registered(shared):
            model = make(*(shared.Config() for _ in range(2)), names="ab")
            text = message_of(RouteError, model, x, adapter_names=["a", BASE, "a", "b", "a"])
        assert text.startswith("Projections of the adapter 'a' does something around a call of the whole model")

    def test_layers_written_by_hand(self, x):
        with registered(hooks_by_hand):
            model = make(*(hooks_by_hand.Config() for _ in range(2)), names="ab")
            text = message_of(RouteError, model, x, adapter_names=["a", "b", "a", "b", "a"])
            assert text.startswith("Calls cannot be routed to 'b': a GatedLayer was put in by its method's own code")
            assert torch.equal(model(x, adapter_names=["a"] * 5), model(x))

    def test_other_keyword_of_peft(self, model, x):
        assert message_of(ConfigError, model, x, alora_offsets=[1]).startswith("alora_offsets=[1] is not supported")
