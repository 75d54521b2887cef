"""The check of a method beside another one on the same layers."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from tunerkit.model import PeftModel
from tunerkit.testing.bench import adapted_layers, move
from tunerkit.testing.comparing import check_bits, check_moved
from tunerkit.testing.neighbour import config_beside, neighbour

if TYPE_CHECKING:
    from tunerkit.testing.bench import Bench


class MixingChecks:
    """The check of a method beside another one on the same layers."""

    def test_mixes_with_another_method(self, bench: Bench) -> None:
        """On layers that also have an adapter of another method, both take part, merge, and are saved each alone.

        To mend: in `forward` and `merged`, stand on `below` and not on the base layer; save and load only what
        `entries` names; take nothing on the layer for the method's own.
        """
        with neighbour():
            model = bench.adapted("own")
            own = bench.run(model)
            model.add_adapter("gain", config_beside(model))
            move(model, "gain", seed=3)
            check_bits(
                bench.run(model), own, "The output with the other method's adapter added, inactive, and that before"
            )
            model.set_adapter("gain")
            alone = {"own": own, "gain": bench.run(model)}
            model.save_pretrained(bench.folder)
            for name, output in alone.items():
                loaded = PeftModel.from_pretrained(bench.base(), bench.folder / name, name)
                check_bits(
                    bench.run(loaded),
                    output,
                    f"The output of the adapter {name!r}, loaded alone, and that of the saved one",
                )
            bench.need_company(model, list(alone))
            foldable = all(a.unfoldable is None for layer in adapted_layers(model) for a in layer.adapters.values())
            for names in itertools.permutations(alone):
                model.set_adapter(list(names))
                together = bench.run(model)
                for output in alone.values():
                    check_moved(together, output, f"The output of {names} together and that of one of them")
                if foldable:
                    model.merge_adapter()
                    bench.check_same(bench.run(model), together, f"The output after merging {names} and that before")
                    model.unmerge_adapter()
                    check_bits(
                        bench.run(model), together, f"The output after unmerging {names} and that before merging"
                    )
            model.set_adapter("own")
            model.delete_adapter("gain")
            check_bits(bench.run(model), own, "The output after the other method's adapter was deleted and that before")
