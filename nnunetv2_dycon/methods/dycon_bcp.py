"""DyCON in bidirectional copy-paste: UnCL's weight on pseudo-labelled regions, FeCL on the mixed patches.

DyCON (CVPR 2025); the framework is BCP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from nnunetv2_dycon.methods.bcp import BCP, BCPSettings
from nnunetv2_dycon.methods.dycon import DyCONTerms, DyCONTermSettings


@dataclass(frozen=True)
class DyCONBCPSettings(DyCONTermSettings, BCPSettings):
    """Options of nnUNetTrainerDyCONBCP."""

    renamed: ClassVar[Mapping[str, str]] = {**DyCONTermSettings.renamed, **BCPSettings.renamed}


class DyCONBCP(DyCONTerms[DyCONBCPSettings], BCP):
    """Bidirectional copy-paste with UnCL's weight on the teacher's labels, and FeCL."""

    settings_type = DyCONBCPSettings
