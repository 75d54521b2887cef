"""The method passes every check that tunerkit makes of one."""

from tunerkit.testing import MethodConformance
from tunerkit_ssf import SSFConfig


class TestSSF(MethodConformance):
    def config(self):
        return SSFConfig()
