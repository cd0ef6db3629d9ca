"""Losses as functions of tensors; they know neither networks nor nnU-Net."""
