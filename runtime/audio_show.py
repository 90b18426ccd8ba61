"""Audio in a notebook: a player and the waveform in one piece of HTML that needs nothing else."""

from __future__ import annotations

import base64
import html

import numpy as np

from aloud.audio_file import encode

_WIDTH, _HEIGHT = 640, 96  # pixels of the waveform


def to_html(samples: np.ndarray, rate: int, caption: str) -> str:
    """Caption, waveform and player of float32 [samples] at `rate` Hz; the sound is inside, as a 16-bit WAV."""
    samples = np.nan_to_num(samples, nan=0.0, posinf=1.0, neginf=-1.0)  # to show something wrong, not to fail
    sound = base64.b64encode(encode(samples, rate, "wav")).decode("ascii")
    return (
        f'<div style="max-width: {_WIDTH}px">'
        f"<code>{html.escape(caption)}</code>"
        f"{to_svg(samples)}"
        f'<audio controls="controls" style="width: 100%" src="data:audio/wav;base64,{sound}"></audio>'
        "</div>"
    )


def to_svg(samples: np.ndarray) -> str:
    """The waveform of float32 [samples] from -1 (bottom) to 1 (top): lowest to highest sample of each pixel column."""
    columns = min(_WIDTH, len(samples))
    path = ""
    if columns:
        starts = np.arange(columns) * len(samples) // columns
        heights = np.clip(np.stack([np.maximum.reduceat(samples, starts), np.minimum.reduceat(samples, starts)]), -1, 1)
        tops, bottoms = (1.0 - heights) * (_HEIGHT / 2)
        centres = (np.arange(columns) + 0.5) * (_WIDTH / columns)
        path = "".join(
            f"M{x:.1f} {top - 0.5:.1f}V{bottom + 0.5:.1f}"  # half a pixel more each way: silence is a line too
            for x, top, bottom in zip(centres, tops, bottoms, strict=True)
        )
    stroke = max(1.0, _WIDTH / columns) if columns else 1.0
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img" '
        f'style="display: block"><title>waveform</title>'
        f'<path d="{path}" stroke="currentColor" stroke-width="{stroke:.2f}" fill="none"/></svg>'
    )
