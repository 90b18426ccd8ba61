"""Every error a user can meet: one class each, one sentence that says what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class AloudError(Exception):
    """Base of all errors that Aloud raises on purpose; each can be pickled, and so leave a process of a pool."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Without `__init__`, whose arguments are not always the message alone."""
        return _remade, (type(self), self.args), self.__dict__ or None


def _remade(kind: type[AloudError], arguments: tuple[Any, ...]) -> AloudError:
    """An error with the arguments that `Exception` keeps of it."""
    return kind.__new__(kind, *arguments)


# --- finding a checkpoint ---------------------------------------------------------------------------------------------


class ModelNotFound(AloudError):
    """The name is neither a local folder nor a repository (or revision) on the hub."""


class ModelGated(AloudError):
    """The repository asks for an accepted licence and a token, and the hub did not see both."""


class ModelOffline(AloudError):
    """The hub cannot be reached and the files are not all in the local cache."""


class DownloadFailed(AloudError):
    """The hub answered, but a file could not be brought here whole."""


# --- reading a checkpoint ---------------------------------------------------------------------------------------------


class CheckpointError(AloudError):
    """Base of what can be wrong with a checkpoint's files."""


class ConfigMissing(CheckpointError):
    """The folder has no config.json."""


class ConfigInvalid(CheckpointError):
    """config.json does not describe a model that can be run here."""


class WrongModelType(CheckpointError):
    """config.json names another kind of model."""


class TokenizerInvalid(CheckpointError):
    """tokenizer.json is missing, unreadable, or lacks the tokens of a prompt."""


class WeightsMissing(CheckpointError):
    """The folder has no safetensors weights."""


class PickleRefused(CheckpointError):
    """The weights are a pickle; loading one can run any code, so none is ever loaded."""


class WeightsCorrupt(CheckpointError):
    """A safetensors file is truncated or is not one."""


class TensorsMismatch(CheckpointError):
    """Tensors are missing, unexpected, or of the wrong shape or dtype; all of them are listed, grouped."""

    def __init__(
        self,
        where: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        wrong_shape: Sequence[str] = (),
        wrong_dtype: Sequence[str] = (),
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.wrong_shape = tuple(wrong_shape)
        self.wrong_dtype = tuple(wrong_dtype)
        groups = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrong shape": self.wrong_shape,
            "not a floating-point dtype that can be read": self.wrong_dtype,
        }
        lines = [f"The tensors in {where} do not fit its config.json:"]
        for title, names in groups.items():
            if names:
                lines.append(f"  {title} ({len(names)}):")
                lines += [f"    {name}" for name in names]
        lines.append("Check that config.json and the weights are from the same model.")
        super().__init__("\n".join(lines))


# --- asking for speech ------------------------------------------------------------------------------------------------


class RequestError(AloudError, ValueError):
    """Base of what can be wrong with one request; raised before any work starts."""


class TextEmpty(RequestError):
    """There is nothing to say."""


class ContextTooLong(RequestError):
    """The prompt, or the prompt and the length asked for, is over the model's context limit."""


class SpeakerInvalid(RequestError):
    """The speaker is not a number that a prompt can name."""


class SamplingInvalid(RequestError):
    """A temperature, top-k, seed or length is out of its range."""


class CodesInvalid(RequestError):
    """Codes to decode have the wrong shape, dtype, or entries that the codec does not have."""


class AudioInvalid(RequestError):
    """Base of what can be wrong with audio that a user gives."""


class AudioEmpty(AudioInvalid):
    """The audio has no samples."""


class AudioNotFinite(AudioInvalid):
    """The audio has NaN or infinite samples."""


class AudioShapeInvalid(AudioInvalid):
    """The array is not [samples], [channels, samples] or [samples, channels], or its dtype is no sample format."""


class AudioRateInvalid(AudioInvalid):
    """The sample rate is outside 8 to 192 kHz."""


class AudioUnreadable(AudioInvalid):
    """The file or bytes cannot be read as audio."""


class AudioTooLong(AudioInvalid):
    """The audio alone is longer than the model's context."""


class AudioUnwritable(AloudError):
    """The audio cannot be saved there, or in that format."""


# --- while speaking ---------------------------------------------------------------------------------------------------


class LogitsNotFinite(AloudError):
    """The model computed NaN or infinite logits, from which no token can be drawn."""


class Overloaded(AloudError):
    """One more stream would make those that run late, or too many wait already."""

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(message)


class EngineClosed(AloudError):
    """The engine is draining or closed, and takes no new work."""


class DeviceStuck(AloudError):
    """A step has been running for far too long: the device does not answer."""


class SessionBusy(RequestError):
    """A session does one thing at a time, and the thing before has not ended."""


class StepFailed(AloudError):
    """The model's step failed for a reason that is not the request's."""


class NothingSpoken(AloudError):
    """The model ended at once or produced only silence, again after a retry."""


class OutOfMemory(AloudError):
    """The device or the machine has too little free memory."""


# --- this machine -----------------------------------------------------------------------------------------------------


class DeviceInvalid(AloudError):
    """The device or dtype asked for does not exist here."""


class MissingDependency(AloudError):
    """An optional package is needed for what was asked."""
