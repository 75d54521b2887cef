"""A layer written by hand in the manner of PEFT's, for the methods that put in their own."""

from __future__ import annotations

from torch import nn

from tunerkit import BaseTunerLayer


class GatedLayer(nn.Module, BaseTunerLayer):
    """A low-rank addition behind one gate."""

    adapter_layer_names = ("toy_down", "toy_up", "toy_gate")
    other_param_names = ("rank",)

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.rank = {}
        self.toy_down = nn.ModuleDict()
        self.toy_up = nn.ModuleDict()
        self.toy_gate = nn.ParameterDict()
        self._active_adapter = []
        self._disable_adapters = False
        self.merged_adapters = []
        self._original = None

    def update_layer(self, adapter_name, rank):
        weight = self.get_base_layer().weight
        self.rank[adapter_name] = rank
        self.toy_down[adapter_name] = nn.Linear(weight.shape[1], rank, bias=False).to(weight)
        self.toy_up[adapter_name] = nn.Linear(rank, weight.shape[0], bias=False).to(weight)
        self.toy_gate[adapter_name] = nn.Parameter(weight.new_ones(1))
        nn.init.zeros_(self.toy_up[adapter_name].weight)

    def running(self):
        return [name for name in self.active_adapters if name in self.rank and name not in self.merged_adapters]

    def get_delta_weight(self, name):
        return self.toy_gate[name] * (self.toy_up[name].weight @ self.toy_down[name].weight)

    def merge(self, safe_merge=False, adapter_names=None):
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.rank and name not in self.merged_adapters]
        if not names:
            return
        base = self.get_base_layer()
        if self._original is None:
            self._original = base.weight.data
        weight = base.weight.detach() + sum(self.get_delta_weight(name).detach() for name in names)
        if safe_merge and not weight.isfinite().all():
            raise ValueError("NaN or infinities")
        base.weight.data = weight.to(base.weight.dtype)
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self):
        if self._original is not None:
            self.get_base_layer().weight.data = self._original
            self._original = None
            self.merged_adapters = []

    def forward(self, x, *args, **kwargs):
        if self.disable_adapters:
            self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        for name in self.running():
            down = self.toy_down[name]
            addition = self.toy_gate[name] * self.toy_up[name](down(x.to(down.weight.dtype)))
            y = y + addition.to(y.dtype)
        return y
