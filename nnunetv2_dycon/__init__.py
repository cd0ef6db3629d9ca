"""Semi-supervised training inside stock nnU-Net. Imports nothing: it runs at every interpreter start."""

__version__ = "0.1.0"
