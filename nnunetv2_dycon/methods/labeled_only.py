"""The control: nnU-Net's own training on the labelled cases alone."""

from typing import ClassVar

from nnunetv2_dycon.methods.settings import TeacherSettings
from nnunetv2_dycon.step import Method


class LabeledOnly(Method[TeacherSettings]):
    """Stock nnU-Net step by step. The average of the student is kept for comparison: it never enters the loss."""

    settings_type = TeacherSettings
    uses_unlabeled: ClassVar[bool] = False
