"""SSF for tunerkit: scales and shifts the outputs of a layer."""

from tunerkit import Method
from tunerkit_ssf.adapter import SSFAdapter
from tunerkit_ssf.config import SSFConfig

__all__ = ["SSFAdapter", "SSFConfig", "method"]

method = Method(config=SSFConfig, adapter=SSFAdapter)
