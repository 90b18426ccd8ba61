"""The face of Aloud: `Runtime` loads a model, speaks, streams, encodes, decodes and scores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from aloud import memory
from aloud.audio import Audio, read_audio
from aloud.checkpoint.load import find, load
from aloud.codec import mimi
from aloud.engine.graphs import GraphSteps
from aloud.engine.loop import Loop
from aloud.engine.slots import allocate_slots
from aloud.engine.steps import EagerSteps
from aloud.engine.stream import Job, Prefix
from aloud.errors import CodesInvalid, DeviceInvalid, EngineClosed, ModelNotFound, OutOfMemory, RequestError
from aloud.models.csm import Csm, CsmConfig, CsmState
from aloud.models.csm_score import score
from aloud.prepare import encode, prepare, read_segments
from aloud.request import AudioSource, Guards, Prompt, Request, Sampling, Segment
from aloud.speech import SpeechStream, speak
from aloud.text.tokenizer import Tokenizer
from aloud.voice import Voice

MAX_STREAMS = 4096
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

    Several threads may use one runtime: what they ask for runs together, over one set of slots, whose memory is
    allocated when the first of them speaks.
    """

    def __init__(
        self,
        model: Csm,
        tokenizer: Tokenizer,
        sampling: Sampling,
        name: str,
        *,
        max_streams: int | None = None,
        max_positions: int | None = None,
    ) -> None:
        """Of parts that are loaded already; `Runtime.load` is the usual way and says what the arguments are."""
        self._model = model
        self._tokenizer = tokenizer
        self.sampling = sampling
        self.name = name
        self.max_positions = _choose_positions(max_positions, model.max_positions)
        self._max_streams = _choose_streams(max_streams)
        self._lock = threading.Lock()
        self._parts: tuple[Loop, EagerSteps[CsmState] | GraphSteps[CsmState]] | None = None

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
        max_streams: int | None = None,
        max_positions: int | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> Runtime:
        """Load a CSM checkpoint.

        model: a name on the hub ("sesame/csm-1b") or a local folder, in transformers' layout or Sesame's.
        revision: branch, tag or commit on the hub.
        token: for a gated repository; by default the one that `hf auth login` stored.
        local_files_only: never ask the hub, use what is in its cache.
        device: "auto" is a CUDA device where there is one, else the CPU.
        dtype: "float32", "bfloat16" or "float16"; "auto" is bfloat16 on a GPU that has it (else float16), and float32
            on the CPU. The codec is always float32.
        max_streams: how many requests can run at once; others wait for their turn. Default: as many as fit into half
            of the free memory, at most 256 on a GPU and 16 on a CPU.
        max_positions: how long prompt and speech of one request can be together, in positions of the model's context
            (text tokens, and frames of audio). Default: the whole context. Less takes less memory a stream.
        progress: called with the name of each step before it is done.

        Raises the errors of `aloud.errors` for whatever is wrong with the name, the files or the device.
        """
        if not isinstance(model, (str, os.PathLike)):
            raise ModelNotFound(
                f"A model is a name on the hub, as a string, or a local folder, got {type(model).__name__}. "
                'Give for instance "sesame/csm-1b".'
            )
        chosen_device = _choose_device(device)
        chosen_dtype = _choose_dtype(dtype, chosen_device)
        progress("files")
        checkpoint = find(model, revision=revision, token=token, local_files_only=local_files_only)
        # Before gigabytes are read.
        tokenizer = Tokenizer(checkpoint.source.folder / "tokenizer.json", checkpoint.config.text_vocabulary)
        progress("weights")
        loaded = load(
            checkpoint, token=token, local_files_only=local_files_only, device=chosen_device, dtype=chosen_dtype
        )
        return cls(
            loaded,
            tokenizer,
            checkpoint.sampling,
            checkpoint.source.name,
            max_streams=max_streams,
            max_positions=max_positions,
        )

    def warm(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Do now what else happens when it is first needed: allocate the streams' memory, compile and capture.

        progress: called with the name of each step before it is done.
        """
        progress("memory of the streams")
        loop, steps = self._running()
        if isinstance(steps, GraphSteps):
            with loop.standing_still():
                costs = steps.capture(progress)
                for rows, seconds in costs.frame_seconds.items():
                    loop.scheduler.observe_frame(rows, seconds)
                for positions, seconds in costs.prefill_seconds.items():
                    loop.scheduler.observe_prefill(positions, seconds)

    @property
    def model(self) -> Csm:
        """The loaded model."""
        return self._model

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        return self._tokenizer

    @property
    def loop(self) -> Loop:
        """What runs all streams; allocates their memory when it is first asked for."""
        return self._running()[0]

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
        voice: Voice | None = None,
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
        voice: of `Runtime.voice`: turns that stand before `context` and have been read already.
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
            voice=voice,
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
        voice: Voice | None = None,
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
            voice=voice,
        )
        job = self._prepare([request])[0]
        return SpeechStream(self._running()[0], self.config.codec, job, progress=progress)

    def speak_batch(self, requests: Sequence[Request], *, progress: bool = False) -> list[Audio]:
        """Say several texts together, each with its own context, sampling, seed and length -> one `Audio` each.

        All requests are checked before any work is done for one.
        """
        jobs = self._prepare(requests)
        return speak(self._running()[0], self.config.codec, jobs, progress=progress) if jobs else []

    def voice(self, segments: Sequence[Segment]) -> Voice:
        """Read a conversation once, for any number of requests to begin behind.

        segments: as `context` of `speak`; their audio gives the voice.

        Raises a `RequestError` when a segment is wrong or they are too long.
        """
        if not isinstance(segments, Sequence) or not segments:
            raise RequestError("A voice is made of a list of aloud.Segment, at least one.")
        prompt, _ = read_segments(self._model, self._tokenizer, segments, max_positions=self.max_positions)
        return Voice(self._model, self._read(prompt))

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
        prompt, frames = read_segments(self._model, self._tokenizer, segments, max_positions=self._model.max_positions)
        with memory.out_of_memory("Scoring needs", self.device, "Score fewer segments, or free some memory."):
            scores = score(self.config, self._model.weights, prompt).cpu()
        lengths = [0 if count is None else count + 1 for count in frames]
        parts = scores.split(lengths)
        return Score(tuple(None if f is None else part.numpy() for f, part in zip(frames, parts, strict=True)))

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Runtime({self.name!r}, device={str(self.device)!r}, dtype={dtype!r})"

    def _prepare(self, requests: Sequence[Request]) -> list[Job]:
        return prepare(self._model, self._tokenizer, self.sampling, requests, max_positions=self.max_positions)

    def _read(self, prompt: Prompt) -> Prefix:
        """Read a prompt and keep what that leaves."""
        loop, _ = self._running()
        job = Job(prompt, self.sampling, 0, max_frames=0, guards=Guards.off(), text_limit_frames=None, keeps_cache=True)
        stream = loop.submit(job)
        try:
            loop.next(stream)
        finally:
            loop.cancel(stream)
        if stream.finish_reason == "cancelled":
            raise EngineClosed("The engine was closed while a voice was read. Make the voice again.")
        if stream.prefix is None:
            raise OutOfMemory(
                f"There is no memory to keep a voice of {len(prompt)} positions. Make it shorter, drop other voices, "
                "or load with a smaller max_streams or max_positions."
            )
        return stream.prefix

    def _running(self) -> tuple[Loop, EagerSteps[CsmState] | GraphSteps[CsmState]]:
        """The loop and its steps, made when they are first needed."""
        with self._lock:
            if self._parts is None:
                slots = allocate_slots(self._model, self._max_streams, self.max_positions)
                steps = (GraphSteps if self.device.type == "cuda" else EagerSteps)(self._model, slots)
                self._parts = Loop(steps, slots.count, self.frame_rate), steps
            return self._parts


def _choose_streams(count: int | None) -> int | None:
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_STREAMS):
        raise DeviceInvalid(f"max_streams must be a whole number from 1 to {MAX_STREAMS}, got {count!r}.")
    return count


def _choose_positions(count: int | None, model_positions: int) -> int:
    if count is None:
        return model_positions
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= model_positions:
        raise DeviceInvalid(f"max_positions must be from 1 to the model's {model_positions}, got {count!r}.")
    return count


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
