"""Checkpoints and how a model is run block by block; nothing of calibration, quantisation or rotation solving."""
