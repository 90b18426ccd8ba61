"""Tokens to frames: stream memory and the loop that steps a model."""
