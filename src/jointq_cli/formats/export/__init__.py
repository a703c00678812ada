"""Packed checkpoints for the runtimes that serve models."""
