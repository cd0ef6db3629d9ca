"""DyCON inside co-training: UnCL and FeCL between two networks, each of which learns from the other.

DyCON (CVPR 2025), section 3.3 and Fig. 7 of the supplement; the framework is CPS.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from nnunetv2_dycon.methods.base import Batch, Group, Term
from nnunetv2_dycon.methods.cps import CPS, CPSSettings
from nnunetv2_dycon.methods.dycon import DyCONTerms, DyCONTermSettings, Pair
from nnunetv2_dycon.networks import FeatureTap, Guide
from nnunetv2_dycon.options import Settings
from nnunetv2_dycon.views import View


@dataclass(frozen=True)
class DyCONCPSSettings(DyCONTermSettings, CPSSettings):
    """Options of nnUNetTrainerDyCONCPS."""


class DyCONCPS(DyCONTerms, CPS):
    """Co-training with UnCL and FeCL, each network being the other's teacher."""

    settings_type: ClassVar[type[Settings]] = DyCONCPSSettings

    def build(self, student: nn.Module) -> None:
        """Make the second network, one head for both (so that embeddings can be compared), and a tap on each."""
        super().build(student)
        self.taps: tuple[FeatureTap, ...] = ()
        if self.build_head(student):
            self.taps = tuple(FeatureTap(network, self.stage) for network in (student, self.teacher.network))

    def cross(self, learner: nn.Module, guide: Guide, batch: Batch, view: View) -> Group:
        """Return UnCL, FeCL and cross pseudo supervision of one network on the unlabelled patches."""
        pair = self._pair(learner, guide)
        return self.unlabeled_terms(pair, partial(self.teach, pair), batch, view)

    def learn(self, learner: nn.Module, guide: Guide, batch: Batch) -> Group:
        """Return the terms of one network on the labelled patches."""
        return self.labeled_terms(self._pair(learner, guide), batch)

    def framework_terms(self, logits: Tensor, target: Tensor, batch: Batch) -> dict[str, Term]:
        """Return the cross pseudo supervision."""
        return {"cps": self.cross_term(logits, target, batch)}

    def _pair(self, learner: nn.Module, guide: Guide) -> Pair:
        if not self.taps:
            return Pair(learner, guide, None, None)
        return Pair(learner, guide, self.taps[learner is self.teacher.network], self.head)
