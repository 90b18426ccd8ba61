"""Aloud: an inference runtime for speech language models that speak in Mimi codec tokens."""

__version__ = "0.1.0"
