from __future__ import annotations

from tunerkit import Method, PeftConfig
from tunerkit.adapter import Adapter


class OnLinears(Adapter):
    entries = ("toy_down", "toy_up")


class OnTables(Adapter):
    entries = ("toy_down", "toy_rows")
    kinds = frozenset({"embedding"})


class TestMethod:
    def test_several_adapter_classes(self):
        method = Method(config=PeftConfig, adapter=(OnLinears, OnTables))
        assert method.adapters == (OnLinears, OnTables)
        assert method.kinds == {"linear", "embedding"}
        assert method.entries == ("toy_down", "toy_up", "toy_rows")
        assert method.adapter_for("linear") is OnLinears
        assert method.adapter_for("embedding") is OnTables

    def test_one_adapter_class(self):
        method = Method(config=PeftConfig, adapter=OnTables)
        assert method.adapters == (OnTables,)
        assert method.kinds == {"embedding"}

    def test_none(self):
        method = Method(config=PeftConfig)
        assert (method.adapters, method.kinds, method.entries) == ((), frozenset(), ())
