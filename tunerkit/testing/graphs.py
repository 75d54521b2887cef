"""Checks of what torch makes of a model with an adapter when it traces it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from tunerkit.testing.comparing import first_tensor

if TYPE_CHECKING:
    from tunerkit.testing.bench import Bench


class GraphChecks:
    """Checks of what torch makes of a model with an adapter when it traces it."""

    def test_compiles(self, bench: Bench) -> None:
        """`torch.compile(fullgraph=True)` makes one graph of the model, and it computes the same.

        To mend: in `forward`, decide nothing by the numbers in a tensor, call nothing that torch cannot trace, and
        write nothing to the adapter.
        """
        model = bench.adapted()
        expected = bench.run(model)
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Any:
            graphs.append(graph)
            return graph

        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of itself
            compiled = torch.compile(model, backend=backend, fullgraph=True)
            with torch.no_grad():
                outputs = [first_tensor(compiled(*bench.inputs)) for _ in range(2)]
        torch.compiler.reset()
        for output in outputs:
            bench.check_same(output, expected, "The output of the compiled model and that of the model")
        assert len(graphs) == 1, f"torch made {len(graphs)} graphs."

    def test_exports(self, bench: Bench) -> None:
        """`torch.export` makes a program of the model that computes the same.

        To mend: as for `test_compiles`; register every tensor on the adapter as a parameter or buffer.
        """
        model = bench.adapted()
        expected = bench.run(model)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, bench.inputs, strict=False)
            output = first_tensor(program.module()(*bench.inputs))
        bench.check_same(output, expected, "The output of the exported program and that of the model")
