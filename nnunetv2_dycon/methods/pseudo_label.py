"""Online pseudo-labels: hard labels of the teacher where it is sure, learnt on a strong view of the same patch.

FixMatch (Sohn et al., NeurIPS 2020) and UniMatch (Yang et al., CVPR 2023), with one strong view and an EMA teacher;
`ema0` makes the labels the student's own, as in these papers.
"""

from dataclasses import dataclass

from nnunetv2_dycon.losses.voxels import hard_targets
from nnunetv2_dycon.methods.settings import TeacherSettings, ViewSettings
from nnunetv2_dycon.options import option
from nnunetv2_dycon.step import Answer, Batch, Cost, Method, Pass, Term, agreement, full_resolution
from nnunetv2_dycon.views import VIEWS, Outputs


@dataclass(frozen=True)
class PseudoLabelSettings(ViewSettings, TeacherSettings):
    """Options of nnUNetTrainerPseudoLabel."""

    view: str = option("intensity", choices=tuple(VIEWS), help="what differs between student and teacher input")
    gate: float = option(0.95, low=0.0, high=1.0, help="teacher confidence from which a voxel counts; 0 = all count")
    w: float = option(1.0, low=0.0, high=1000.0, help="weight of the pseudo-label term after the ramp")


class PseudoLabel(Method[PseudoLabelSettings]):
    """The teacher's hard labels where it is sure, learnt on a strong view of each unlabelled patch."""

    settings_type = PseudoLabelSettings

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return cross-entropy plus Dice (or option `ga`) against the pseudo-labels of voxels that pass the gate."""
        logits, target = full_resolution(outputs), answer.target
        hard = hard_targets(target, self.settings.gate)
        term = Term(self.settings.w * batch.now["ramp"], self.pseudo_loss(logits, hard, hard.weight))
        return Cost({"pseudo": term}, {"agreement": agreement(logits, target), "voxels_kept": hard.weight.mean()})
