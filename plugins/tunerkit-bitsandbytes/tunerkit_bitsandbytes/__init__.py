"""The quantised layers of bitsandbytes for tunerkit."""

from __future__ import annotations

from bitsandbytes.nn import Linear4bit, Linear8bitLt

from tunerkit_bitsandbytes.eight_bits import EightBitSite
from tunerkit_bitsandbytes.four_bits import FourBitSite

__all__ = ["EightBitSite", "FourBitSite", "sites"]

sites = {Linear4bit: FourBitSite, Linear8bitLt: EightBitSite}
