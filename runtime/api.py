"""The face of Aloud: `Runtime` loads a model, speaks, streams, encodes, decodes and scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from aloud import memory
from aloud.audio import Audio, read_audio
from aloud.checkpoint.load import find, load
from aloud.codec import mimi
from aloud.engine.loop import Job
from aloud.errors import CodesInvalid, DeviceInvalid, RequestError
from aloud.models.csm import Csm, CsmConfig
from aloud.models.csm_score import score
from aloud.prepare import encode, prepare, read_segments
from aloud.request import AudioSource, Guards, Request, Sampling, Segment
from aloud.speech import SpeechStream, speak
from aloud.text.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Score:
    """How likely a model finds a conversation's audio.

    segments: for each segment float32 [frames + 1, codebooks], the natural log-likelihoods of its frames and of the
        end frame behind them; None for a segment without audio.
    """

    segments: tuple[np.ndarray | None, ...]

    @property
    def backbone_loss(self) -> float:
        """Mean negative log-likelihood of codebook 0."""
        return -float(self._all()[:, 0].mean())

    @property
    def depth_loss(self) -> float:
        """Mean negative log-likelihood of the other codebooks."""
        return -float(self._all()[:, 1:].mean())

    @property
    def loss(self) -> float:
        """Both together, as models are trained."""
        return self.backbone_loss + self.depth_loss

    def _all(self) -> np.ndarray:
        return np.concatenate([part for part in self.segments if part is not None]).astype(np.float64)


class Runtime:
    """A loaded model that speaks.

    Several threads may use one runtime; each call has memory of its own.
    """

    def __init__(self, model: Csm, tokenizer: Tokenizer, sampling: Sampling, name: str) -> None:
        """Of parts that are loaded already; `Runtime.load` is the usual way."""
        self._model = model
        self._tokenizer = tokenizer
        self.sampling = sampling
        self.name = name

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> Runtime:
        """Load a CSM checkpoint.

        model: a name on the hub ("sesame/csm-1b") or a local folder, in transformers' layout or Sesame's.
        revision: branch, tag or commit on the hub.
        token: for a gated repository; by default the one that `hf auth login` stored.
        local_files_only: never ask the hub, use what is in its cache.
        device: "auto" is a CUDA device where there is one, else the CPU.
        dtype: "float32", "bfloat16" or "float16"; "auto" is bfloat16 on a GPU that has it (else float16), and float32
            on the CPU. The codec is always float32.

        Raises the errors of `aloud.errors` for whatever is wrong with the name, the files or the device.
        """
        chosen_device = _choose_device(device)
        chosen_dtype = _choose_dtype(dtype, chosen_device)
        checkpoint = find(model, revision=revision, token=token, local_files_only=local_files_only)
        # Before gigabytes are read.
        tokenizer = Tokenizer(checkpoint.source.folder / "tokenizer.json", checkpoint.config.text_vocabulary)
        loaded = load(
            checkpoint, token=token, local_files_only=local_files_only, device=chosen_device, dtype=chosen_dtype
        )
        return cls(loaded, tokenizer, checkpoint.sampling, checkpoint.source.name)

    @property
    def config(self) -> CsmConfig:
        """Sizes of the model."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self._model.weights.text_embedding.dtype

    @property
    def sample_rate(self) -> int:
        """Samples a second of what is spoken, in Hz."""
        return self.config.codec.sample_rate

    @property
    def frame_rate(self) -> float:
        """Frames a second, in Hz."""
        return self.config.codec.frame_rate

    def speak(
        self,
        text: str,
        *,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        temperature: float | None = None,
        top_k: int | None = None,
        depth_temperature: float | None = None,
        depth_top_k: int | None = None,
        seed: int | None = None,
        max_seconds: float | None = None,
        guards: Guards | None = None,
        progress: bool = False,
    ) -> Audio:
        """Say a text.

        speaker: the speaker's number in the conversation.
        context: the turns before, with their audio; they give the voice.
        temperature, top_k: of both decoders; temperature 0 is greedy, a top_k of 0 keeps every token. Default: the
            checkpoint's.
        depth_temperature, depth_top_k: of the depth decoder, where it should differ.
        seed: 0 to 2^64 - 1; the same seed gives the same speech. Default: a fresh one, found on the result.
        max_seconds: the longest to speak, rounded to whole frames. Default: until the end of speech, at most 90 s and
            what the context leaves.
        guards: what ends speech that does not end by itself. Default: `Guards()` without `max_seconds`,
            `Guards.off()` with it.
        progress: show a bar on stderr.

        -> `Audio` with samples, codes, the seed used and why it ended. Raises a `RequestError` before any work when
        the request is wrong, `NothingSpoken` when the model says nothing, twice.
        """
        request = Request(
            text=text,
            speaker=speaker,
            context=context,
            temperature=temperature,
            top_k=top_k,
            depth_temperature=depth_temperature,
            depth_top_k=depth_top_k,
            seed=seed,
            max_seconds=max_seconds,
            guards=guards,
        )
        return self.speak_batch([request], progress=progress)[0]

    def stream(
        self,
        text: str,
        *,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        temperature: float | None = None,
        top_k: int | None = None,
        depth_temperature: float | None = None,
        depth_top_k: int | None = None,
        seed: int | None = None,
        max_seconds: float | None = None,
        guards: Guards | None = None,
        progress: bool = False,
    ) -> SpeechStream:
        """Say a text and hand out each 80 ms as it is made; the arguments are those of `speak`.

        The request is checked, and its context encoded, in this call; the first chunk comes after the first frame.
        """
        request = Request(
            text=text,
            speaker=speaker,
            context=context,
            temperature=temperature,
            top_k=top_k,
            depth_temperature=depth_temperature,
            depth_top_k=depth_top_k,
            seed=seed,
            max_seconds=max_seconds,
            guards=guards,
        )
        return SpeechStream(self._model, self._prepare([request])[0], progress=progress)

    def speak_batch(self, requests: Sequence[Request], *, progress: bool = False) -> list[Audio]:
        """Say several texts together, each with its own context, sampling, seed and length -> one `Audio` each.

        All requests are checked before any work is done for one.
        """
        jobs = self._prepare(requests)
        return speak(self._model, jobs, progress=progress) if jobs else []

    def encode(self, audio: AudioSource) -> np.ndarray:
        """Audio, as `Segment.audio` takes it, to the codec's tokens -> int64 [frames, codebooks]."""
        return encode(self._model, read_audio(audio, sample_rate=self.sample_rate)).numpy()

    def decode(self, codes: np.ndarray | torch.Tensor) -> Audio:
        """The codec's tokens, int [frames, codebooks] of the first codebooks or all, to sound.

        Raises `CodesInvalid`.
        """
        try:
            tensor = torch.as_tensor(codes)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CodesInvalid(f"Codes must be an array of integers [frames, codebooks]: {error}.") from error
        if tensor.dim() != 2 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise CodesInvalid(
                f"Codes must be integers [frames, codebooks], got {tensor.dtype} {list(tensor.shape)}. "
                "Give them as `encode` returns them."
            )
        if not 1 <= tensor.shape[1] <= self.config.codec.num_codebooks:
            raise CodesInvalid(
                f"Codes must be [frames, codebooks] with 1 to {self.config.codec.num_codebooks} codebooks, "
                f"got {list(tensor.shape)}. Give them as `encode` returns them."
            )
        tensor = tensor.to(torch.int64)
        with memory.out_of_memory("Decoding needs", self.device, "Decode fewer frames, or free some memory."):
            samples = mimi.decode(self.config.codec, self._model.codec, tensor.T)
        return Audio(samples.cpu().numpy(), self.sample_rate, tensor.cpu().numpy())

    def score(self, segments: Sequence[Segment]) -> Score:
        """Log-likelihood of a conversation's audio, for each frame and codebook, given all that stands before it."""
        if not isinstance(segments, Sequence) or not all(isinstance(segment, Segment) for segment in segments):
            raise RequestError("A conversation is a list of aloud.Segment.")
        if all(segment.audio is None for segment in segments):
            raise RequestError("There is nothing to score: no segment has audio. Give at least one segment its audio.")
        prompt, frames = read_segments(self._model, self._tokenizer, segments)
        with memory.out_of_memory("Scoring needs", self.device, "Score fewer segments, or free some memory."):
            scores = score(self.config, self._model.weights, prompt).cpu()
        lengths = [0 if count is None else count + 1 for count in frames]
        parts = scores.split(lengths)
        return Score(tuple(None if f is None else part.numpy() for f, part in zip(frames, parts, strict=True)))

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Runtime({self.name!r}, device={str(self.device)!r}, dtype={dtype!r})"

    def _prepare(self, requests: Sequence[Request]) -> list[Job]:
        return prepare(self._model, self._tokenizer, self.sampling, requests)


def _choose_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceInvalid(f'There is no device {device!r}. Choose "auto", "cpu", "cuda" or "cuda:N".') from error
    if chosen.type not in ("cpu", "cuda"):
        raise DeviceInvalid(f'Device "{chosen}" is not supported. Choose "auto", "cpu", "cuda" or "cuda:N".')
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise DeviceInvalid(
            f'Device "{chosen}" was asked for, but torch sees {torch.cuda.device_count()} CUDA devices. '
            'Choose "cpu", or install a torch build and driver that see the GPU.'
        )
    return chosen


def _choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise DeviceInvalid(f'There is no dtype {dtype!r} to run in. Choose "auto", {", ".join(map(repr, DTYPES))}.')
