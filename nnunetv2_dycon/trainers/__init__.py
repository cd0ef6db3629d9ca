"""The trainers that nnU-Net runs; only `engine.py` knows how nnU-Net trains."""
