"""DyCON on MagicNet: UnCL's weight on the blended pseudo-labels, FeCL on patches of the exchanged cubes put back.

DyCON (CVPR 2025), section 5 of the supplement, which has no code; the framework is MagicNet, with option `ga` its
gradient-aware losses.
"""

from dataclasses import dataclass

from nnunetv2_dycon.methods.dycon import DyCONTerms, DyCONTermSettings
from nnunetv2_dycon.methods.magicnet import MagicNet, MagicNetSettings


@dataclass(frozen=True)
class DyCONMagicNetSettings(DyCONTermSettings, MagicNetSettings):
    """Options of nnUNetTrainerDyCONMagicNet."""


class DyCONMagicNet(DyCONTerms[DyCONMagicNetSettings], MagicNet):
    """MagicNet with UnCL's weight on its pseudo-labels, and FeCL."""

    settings_type = DyCONMagicNetSettings
