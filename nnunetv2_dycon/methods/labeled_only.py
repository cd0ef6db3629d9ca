"""The control: nnU-Net's own training on the labelled cases alone."""

from typing import ClassVar

from nnunetv2_dycon.methods.base import Method


class LabeledOnly(Method):
    """Stock nnU-Net step by step. Its EMA is kept for comparison only: it never enters the loss."""

    uses_unlabeled: ClassVar[bool] = False
