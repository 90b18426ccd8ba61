"""The plot of audio: waveform above spectrogram over one time axis. Imports matplotlib, so import it where needed."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_WINDOW = 1024  # samples of one spectrum: 43 ms at 24 kHz
_HOP = 256  # samples from one spectrum to the next
_FLOOR_DECIBELS = -100.0


class AudioFigure(Figure):
    """A figure that notebooks show although pyplot, with its global state, never saw it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def plot(samples: np.ndarray, rate: int) -> Figure:
    """Draw float32 [samples] at `rate` Hz; time in seconds, frequency in kHz, level in dB of a full-scale sine."""
    figure = AudioFigure(figsize=(9, 5), layout="constrained")
    wave, spectrum = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    seconds = max(len(samples), 1) / rate

    wave.plot(np.arange(len(samples)) / rate, samples, linewidth=0.5)
    wave.set_ylim(-1.05, 1.05)
    wave.set_ylabel("amplitude")

    half_hop = _HOP / 2 / rate
    levels = spectrogram(samples)
    image = spectrum.imshow(
        levels.T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        # A spectrum stands for the hop around its centre; a bin for the band around its frequency.
        extent=(
            -half_hop,
            (len(levels) - 1) * _HOP / rate + half_hop,
            -rate / _WINDOW / 2 / 1000,
            rate / 2 / 1000 + rate / _WINDOW / 2 / 1000,
        ),
        vmin=_FLOOR_DECIBELS,
        vmax=0.0,
        cmap="magma",
    )
    spectrum.set_xlim(0.0, seconds)
    spectrum.set_ylim(0.0, rate / 2 / 1000)
    spectrum.yaxis.set_major_locator(MaxNLocator(nbins=7))
    spectrum.set_xlabel("time (s)")
    spectrum.set_ylabel("frequency (kHz)")
    figure.colorbar(image, ax=spectrum, label="level (dB)")
    return figure


def spectrogram(samples: np.ndarray) -> np.ndarray:
    """Levels in dB, [spectra, 513], Hann window of 1024 samples, one spectrum centred on every 256th sample."""
    finite = np.nan_to_num(samples, nan=0.0, posinf=1.0, neginf=-1.0)
    padded = np.pad(finite, (_WINDOW // 2, _WINDOW // 2 + _HOP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[: max(len(samples), 1) : _HOP]
    window = np.hanning(_WINDOW + 1)[:-1].astype(np.float32)  # periodic
    magnitudes = np.abs(np.fft.rfft(frames * window)) / (window.sum() / 2)  # a full-scale sine is 1
    return np.maximum(20.0 * np.log10(np.maximum(magnitudes, 1e-12)), _FLOOR_DECIBELS)
