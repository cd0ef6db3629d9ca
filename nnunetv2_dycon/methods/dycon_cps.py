"""DyCON inside co-training: UnCL and FeCL between two networks, each of which learns from the other.

DyCON (CVPR 2025), section 3.3 and Fig. 7 of the supplement; the framework is CPS.
"""

from dataclasses import dataclass

from nnunetv2_dycon.methods.cps import CPS, CPSSettings
from nnunetv2_dycon.methods.dycon import DyCONTerms, DyCONTermSettings


@dataclass(frozen=True)
class DyCONCPSSettings(DyCONTermSettings, CPSSettings):
    """Options of nnUNetTrainerDyCONCPS."""


class DyCONCPS(DyCONTerms[DyCONCPSSettings], CPS):
    """Co-training with UnCL and FeCL, each network being the other's teacher."""

    settings_type = DyCONCPSSettings
