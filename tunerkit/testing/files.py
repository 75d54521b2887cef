"""Checks of checkpoints and configs: what is saved comes back, and nothing else is needed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from tunerkit.adapter import Adapter
from tunerkit.config import PeftConfig
from tunerkit.functional import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from tunerkit.model import PeftModel
from tunerkit.testing.bench import adapted_layers, adapter_tensors, all_tensors, loss_of, trained
from tunerkit.testing.comparing import check_bits, same_bits

if TYPE_CHECKING:
    from tunerkit.testing.bench import Bench


class FileChecks:
    """Checks of checkpoints and configs."""

    def test_save_and_load(self, bench: Bench) -> None:
        """A checkpoint loaded onto a fresh base model gives the same output, bit for bit.

        To mend: hold all that was trained in parameters or persistent buffers that `entries` names, and derive the rest
        from the config, the site and these.
        """
        model = bench.adapted()
        model.save_pretrained(bench.folder)
        torch.manual_seed(5)  # what an adapter draws at random must not matter
        loaded = PeftModel.from_pretrained(bench.base(), bench.folder)
        check_bits(bench.run(loaded), bench.run(model), "The output of the loaded model and that of the saved one")
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        again = PeftModel.from_pretrained(bench.base(), bench.folder, is_trainable=True, low_cpu_mem_usage=True)
        what = "The output of the model loaded with low_cpu_mem_usage=True and that of the saved one"
        check_bits(bench.run(again), bench.run(model), what)

    def test_checkpoint_holds_the_declared_entries(self, bench: Bench) -> None:
        """A checkpoint's keys are the adapted layers' paths with the names in `entries`, and every tensor is there.

        What a `Part` says that it exposes is there too.

        To mend: name in `entries` every attribute of the adapter (and of its `Part`) that holds tensors, as PEFT does,
        and in `exposes` only methods that the `Part` has.
        """
        model = bench.adapted()
        model.save_pretrained(bench.folder)
        saved = load_peft_weights(bench.folder)
        part = model.base_model.parts.get("default")
        shared = {} if part is None else part.state_dict()
        method = bench.method
        if all(kind.to_checkpoint is Adapter.to_checkpoint for kind in method.adapters):
            held = adapter_tensors(model, "default")
            assert saved.keys() == {("base_model." if key in shared else "base_model.model.") + key for key in held}
        entries = set(method.part.entries if method.part else ())
        for layer in adapted_layers(model):
            adapter = layer.adapters["default"]
            entries |= {*adapter.entries} - adapter._non_persistent_buffers_set
        if entries:
            assert {part for key in saved for part in key.split(".") if part in entries} == entries
            assert [key for key in saved if entries.isdisjoint(key.split("."))] == []
        assert all(tensor.numel() for tensor in saved.values())
        exposed = method.part.exposes if method.part else ()
        assert [name for name in exposed if not callable(getattr(model, name, None))] == []

    def test_load_beside_another(self, bench: Bench) -> None:
        """A checkpoint loaded beside another adapter changes nothing until it is active, and then gives its output.

        To mend: make nothing depend on the adapter's name or on there being one adapter only.
        """
        source = bench.adapted("one")
        source.save_pretrained(bench.folder)
        model = bench.adapted("two")
        other = bench.run(model)
        report = model.load_adapter(bench.folder / "one", "three")
        assert (report.missing_keys, report.unexpected_keys) == ([], [])
        check_bits(bench.run(model), other, "The output with another adapter loaded beside and that before")
        model.set_adapter("three")
        check_bits(bench.run(model), bench.run(source), "The output of the loaded adapter and that of the saved one")

    def test_tensors_as_a_dict(self, bench: Bench) -> None:
        """`get_peft_model_state_dict` and `set_peft_model_state_dict` carry an adapter from one model to another.

        To mend: let `from_checkpoint` undo `to_checkpoint`, and define both or neither.
        """
        for kind in bench.method.adapters:
            own = (kind.to_checkpoint is not Adapter.to_checkpoint, kind.from_checkpoint is not Adapter.from_checkpoint)
            assert own[0] == own[1], f"{kind.__name__} defines one of `to_checkpoint` and `from_checkpoint` alone."
        source = bench.adapted()
        tensors = get_peft_model_state_dict(source)
        target = bench.start()
        report = set_peft_model_state_dict(target, tensors)
        assert (report.missing_keys, report.unexpected_keys) == ([], [])
        check_bits(bench.run(target), bench.run(source), "The outputs before and after the tensors were carried over")

    def test_config_round_trip(self, bench: Bench) -> None:
        """A config comes back from its file, through plain JSON, as it was.

        To mend: use plain values (numbers, text, lists, dicts) in the config, annotate every field, and undo in
        `__post_init__` what JSON cannot hold.
        """
        config = bench.config()
        config.save_pretrained(bench.folder)
        loaded = PeftConfig.from_pretrained(bench.folder)
        assert type(loaded) is type(config)
        assert loaded == config
        values = json.loads((bench.folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert PeftConfig.from_peft_type(**values) == config

    def test_config_is_not_changed(self, bench: Bench) -> None:
        """Putting an adapter in, saving and loading leave the caller's config as it was.

        To mend: `_prepare_adapter_config` may change the copy it is given; an adapter only reads its config.
        """
        config = bench.config()
        before = config.copy()
        model = bench.case.attach(bench.base(), config, "one")
        model.add_adapter("two", config)
        assert model.peft_config["one"] is not model.peft_config["two"]
        model.save_pretrained(bench.folder)
        assert config == before
        assert model.peft_config["one"] is not config
        assert model.peft_config["two"] is not config

    def test_load_on_meta(self, bench: Bench) -> None:
        """An adapter made on the meta device and filled from a checkpoint computes the same; nothing stays on meta.

        To mend: make tensors with `site.zeros`, `site.normal` and the like, on the device they are made for; a tensor
        that no checkpoint holds is made so that it is the same each time, on a device that is no accident.
        """
        model = bench.adapted()
        model.save_pretrained(bench.folder)
        loaded = PeftModel.from_pretrained(bench.base(), bench.folder, low_cpu_mem_usage=True)
        loaded.load_adapter(bench.folder, "beside", low_cpu_mem_usage=True)
        for name in ("default", "beside"):
            tensors = {**adapter_tensors(loaded, name), **all_tensors(loaded, name)}
            left = [key for key, tensor in tensors.items() if tensor.is_meta]
            assert left == [], f"On the meta device after loading: {left}."
            loaded.set_adapter(name)
            check_bits(
                bench.run(loaded),
                bench.run(model),
                f"The output of {name!r}, loaded on meta, and that of the saved one",
            )

    def test_hostile_names(self, bench: Bench) -> None:
        """Adapters called like the method's own entries, like a tensor, or like one another are saved and come back.

        To mend: find tensors by the adapter that holds them, never by looking for a name in a key.
        """
        method = bench.method
        entries = (*method.entries, *(method.part.entries if method.part else ()))
        names = tuple(dict.fromkeys((*entries, "weight", "default2", "0", "a", "ab")))
        model = bench.adapted(*names)
        model.save_pretrained(bench.folder)
        first, *others = names
        loaded = PeftModel.from_pretrained(bench.base(), bench.folder / first, first)
        for name in others:
            report = loaded.load_adapter(bench.folder / name, name)
            assert (report.missing_keys, report.unexpected_keys) == ([], []), name
        for name in names:
            model.set_adapter(name)
            loaded.set_adapter(name)
            check_bits(
                bench.run(loaded),
                bench.run(model),
                f"The output of the adapter {name!r} as it came back and as it was saved",
            )

    def test_no_tensor_left_unsaved(self, bench: Bench) -> None:
        """After training, every tensor that the adapter holds in any way is the same in one loaded from a checkpoint.

        To mend: a tensor that changes is a parameter or persistent buffer that `entries` names; one that does not is
        derived from the config, the site and these, never drawn at random.
        """
        model = bench.adapted().train()
        optimizer = torch.optim.SGD(trained(model, "default").values(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(bench.call(model)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.eval().save_pretrained(bench.folder)
        torch.manual_seed(5)
        loaded = PeftModel.from_pretrained(bench.base(), bench.folder)
        check_bits(
            bench.run(loaded),
            bench.run(model),
            "The output of the model loaded after training and that of the saved one",
        )
        before, after = all_tensors(model, "default"), all_tensors(loaded, "default")
        lost = [key for key, tensor in before.items() if key not in after or not same_bits(tensor, after[key])]
        assert lost == [], f"Neither in the checkpoint nor derived from the config and the base model: {lost}."
