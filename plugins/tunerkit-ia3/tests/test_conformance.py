"""IA3 passes every check of the conformance kit, on outputs and on inputs of layers."""

from tunerkit.testing import MethodConformance
from tunerkit_ia3 import IA3Config


class TestIA3(MethodConformance):
    def config(self):
        return IA3Config(feedforward_modules=".*(square|second)")
