"""Mimi, the codec: 24 kHz samples to codebook tokens and back, whole or frame by frame."""
