"""The `aloud` command: speak, serve, inspect, warm, random, bench."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from aloud import __version__
from aloud.errors import AloudError, AudioUnreadable, AudioUnwritable, MissingDependency, RequestError
from aloud.request import MAX_SECONDS, Guards, Request, Segment

if TYPE_CHECKING:
    from aloud.api import Runtime
    from aloud.audio import Audio
    from aloud.live_speech import LiveSpeech
    from aloud.speech import SpeechStream

MODEL = "sesame/csm-1b"
EXIT_ERROR, EXIT_INTERRUPTED = 1, 130  # argparse itself exits with 2 on wrong usage
MAX_DRAIN_SECONDS = 86_400


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command -> its exit status: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["bench"]:  # its arguments are the benchmarks' own, but for --debug
        parsed = argparse.Namespace(
            run=_bench, debug="--debug" in given, rest=[argument for argument in given[1:] if argument != "--debug"]
        )
    else:
        parsed = _parser().parse_args(given)
    try:
        status: int = parsed.run(parsed)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output is gone: there is nobody to tell
        _discard_output()
        return EXIT_ERROR
    except Exception as error:
        if parsed.debug:
            traceback.print_exc()
        _tell(f"aloud: {_sentence(error)}")
        if isinstance(error, OSError):
            _discard_output()
        return EXIT_ERROR


def _sentence(error: Exception) -> str:
    """What the user reads of an error."""
    if isinstance(error, AloudError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:  # a full disk, a folder without permission
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (
        f"{type(error).__name__}: {error}\n"
        "This is a fault of the program. Run it again with --debug and report what it prints."
    )


def _discard_output() -> None:
    """Drop what standard output holds if it cannot be written: the interpreter's own last flush would complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aloud", description="Speech from Mimi-token speech language models.")
    parser.add_argument("--version", action="version", version=f"aloud {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    hub = argparse.ArgumentParser(add_help=False)
    hub.add_argument("--revision", help="branch, tag or commit on the hub")
    hub.add_argument("--local-files-only", action="store_true", help="use the cache, never the network")

    speak = commands.add_parser("speak", parents=[common, hub], help="say a text")
    speak.set_defaults(run=_speak)
    speak.add_argument("text", help='what to say; "-" reads it from standard input')
    speak.add_argument(
        "-o", "--output", required=True, metavar="FILE",
        help='a .wav, .flac, .ogg or .mp3 file; "-" writes raw PCM (s16le, mono, the model\'s rate: 24 kHz) to '
        "standard output while speaking",
    )  # fmt: skip
    speak.add_argument("--model", default=MODEL, help=f"hub name or folder (default: {MODEL})")
    speak.add_argument("--speaker", type=int, default=0, help="speaker number (default: 0)")
    speak.add_argument(
        "--context", action="append", default=[], type=_segment, metavar="FILE:TEXT:SPEAKER",
        help="a turn before: its audio (may be empty), its text, its speaker; may be repeated",
    )  # fmt: skip
    speak.add_argument("--seed", type=int, help="repeat a run (default: a fresh seed)")
    speak.add_argument("--temperature", type=float, help="0 is greedy (default: the checkpoint's)")
    speak.add_argument("--top-k", type=int, help="0 keeps every token (default: the checkpoint's)")
    speak.add_argument("--depth-temperature", type=float, help="of the depth decoder (default: --temperature)")
    speak.add_argument("--depth-top-k", type=int, help="of the depth decoder (default: --top-k)")
    speak.add_argument("--max-seconds", type=float, help="the longest to speak (default: until the end of speech)")
    speak.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    speak.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")

    serve = commands.add_parser("serve", parents=[common, hub], help="a server that OpenAI's clients can talk to")
    serve.set_defaults(run=_serve)
    serve.add_argument("model", nargs="?", default=MODEL, help=f"hub name or folder (default: {MODEL})")
    serve.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000")
    serve.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="a key a line, comments behind # on lines of their own; without it, everybody who reaches it may ask",
    )
    serve.add_argument("--voices", type=Path, metavar="DIR", help="where voices are kept (default: until it stops)")
    serve.add_argument(
        "--alias",
        action="append",
        type=_alias,
        default=[],
        metavar="NAME=VOICE",
        help="a name for a kept voice or a speaker's number, as alloy=anna or nova=7 (again for more)",
    )
    serve.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="SITE",
        help="another site whose pages may ask, as https://app.example (again for more)",
    )
    serve.add_argument(
        "--sessions", type=Path, metavar="DIR", help="where sessions are kept, also for other servers (default: memory)"
    )
    serve.add_argument(
        "--max-streams", type=int, help="streams at once (default: what fits, at most 256; on a CPU, 16)"
    )
    serve.add_argument("--max-positions", type=int, help="context of a stream (default: the model's)")
    serve.add_argument("--max-waiting", type=int, default=64, help="requests that may wait for a stream (default: 64)")
    serve.add_argument(
        "--drain-seconds",
        type=float,
        default=100.0,
        help="for what runs, after SIGTERM; a second one, or Ctrl-C, ends it at once (default: 100)",
    )
    serve.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    serve.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")

    inspect = commands.add_parser("inspect", parents=[common, hub], help="what a checkpoint is and needs")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("model", help="hub name or folder; no weights are read")

    warm = commands.add_parser("warm", parents=[common, hub], help="compile now what a first start would compile")
    warm.set_defaults(run=_warm)
    warm.add_argument("model", help="hub name or folder")
    warm.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    warm.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    warm.add_argument(
        "--max-streams", type=int, help="as it will be loaded (default: what fits, at most 256; on a CPU, 16)"
    )
    warm.add_argument("--max-positions", type=int, help="as it will be loaded (default: the whole context)")

    random = commands.add_parser("random", parents=[common], help="write a checkpoint of random weights: noise")
    random.set_defaults(run=_random)
    random.add_argument("folder", type=Path, help="where to write it")
    random.add_argument("--size", default="small", choices=("small", "csm-1b"), help="default: small")
    random.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="default: float32"
    )
    random.add_argument("--seed", type=int, default=0, help="default: 0")

    commands.add_parser("bench", help="run the benchmarks: aloud bench --help", add_help=False)
    return parser


def _speak(parsed: argparse.Namespace) -> int:
    # Heavy modules are imported by the commands that need them: help and usage errors answer at once.
    from aloud.api import Runtime
    from aloud.audio import check_writable
    from aloud.prepare import check_request

    # Whatever can be wrong is found before the model is loaded, which takes much longer.
    raw = parsed.output == "-"
    if not raw:
        check_writable(parsed.output)
    elif sys.stdout is None or sys.stdout.isatty():
        raise AudioUnwritable(
            "Raw PCM goes to a pipe or a file, not to a terminal. Pipe it, or name a file with -o FILE."
        )
    for segment in parsed.context:
        if segment.audio is not None and not os.path.exists(segment.audio):
            raise AudioUnreadable(f"There is no file {segment.audio!r}; check the path.")
    request = Request(
        text=_read_text(sys.stdin) if parsed.text == "-" else parsed.text,
        speaker=parsed.speaker,
        context=parsed.context,
        temperature=parsed.temperature,
        top_k=parsed.top_k,
        depth_temperature=parsed.depth_temperature,
        depth_top_k=parsed.depth_top_k,
        seed=parsed.seed,
        max_seconds=parsed.max_seconds,
    )
    check_request(request)

    runtime = Runtime.load(
        parsed.model,
        revision=parsed.revision,
        local_files_only=parsed.local_files_only,
        device=parsed.device,
        dtype=parsed.dtype,
        max_streams=1,
    )
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    spoken: Audio | SpeechStream | LiveSpeech
    if _is_said_in_parts(request, runtime.frame_rate):
        spoken, seconds = _speak_in_parts(runtime, request, parsed.output, shown=on_terminal)
    elif raw:
        with runtime.stream(**vars(request), progress=on_terminal) as spoken:
            seconds = _write_raw(spoken)
    else:
        spoken = runtime.speak(**vars(request), progress=on_terminal)
        seconds = _save(spoken, parsed.output)
    is_cut_off = parsed.max_seconds is None or seconds < parsed.max_seconds - 1 / runtime.frame_rate
    if spoken.finish_reason == "length" and is_cut_off:
        _tell(
            f"aloud: the speech was cut off after {seconds:.1f} s: no more fits in {MAX_SECONDS:g} s and the model's "
            "context. Say less in one sentence, or behind less context."
        )
    if on_terminal:
        _tell(f"{parsed.output}: ended by {spoken.finish_reason}, --seed {spoken.seed}")
    return 0


def _is_said_in_parts(request: Request, frame_rate_hz: float) -> bool:
    """Whether what is said might be more than fits into one go, so that it is cut at its sentences."""
    from aloud.engine.guards import text_limit_frames
    from aloud.text.split import split

    if request.max_seconds is not None and request.max_seconds <= MAX_SECONDS:
        return False
    limit_frames = text_limit_frames(Guards(), request.text, frame_rate_hz) or 0
    return limit_frames > MAX_SECONDS * frame_rate_hz or bool(request.context and len(split(request.text)) > 1)


def _speak_in_parts(runtime: Runtime, request: Request, path: str, *, shown: bool) -> tuple[LiveSpeech, float]:
    """Say a text as an engine does -> the speech and its seconds.

    Where it breaks off, by Ctrl-C or an error, what was said until then is kept: it may be most of an hour. It has
    another name than was asked for, so that a file of that name is whole.
    """
    from aloud.audio import Audio
    from aloud.live import Engine
    from aloud.speech import Progress

    said: list[Audio] = []
    try:
        with Engine(runtime) as engine, Progress(shown=shown) as bar:
            speech = engine.stream(**vars(replace(request, guards=Guards())), pace="full")
            if path == "-":
                return speech, _write_raw(bar.over(speech))
            for chunk in bar.over(speech):
                said.append(chunk)
    except BaseException:
        if said:
            whole, kept = Audio.concatenate(said), Path(path)
            kept = kept.with_name(f"{kept.stem}.part{kept.suffix}")
            _tell(f"aloud: saving the {whole.duration:.1f} s that were said until then as {kept}")
            _save(whole, str(kept))
        raise
    return speech, _save(engine.joined(said, speech), path)


def _save(audio: Audio, path: str) -> float:
    """Write a file -> its seconds."""
    audio.save(path)
    return audio.duration


def _tell(sentence: str) -> None:
    """Say something on standard error, which may be closed."""
    if sys.stderr is not None:
        print(sentence, file=sys.stderr)


def _write_raw(chunks: Iterable[Audio]) -> float:
    """Write 16-bit samples to standard output as they come -> their seconds."""
    from aloud.audio_file import to_int16

    seconds = 0.0
    for chunk in chunks:
        sys.stdout.buffer.write(to_int16(chunk.samples).astype("<i2").tobytes())
        sys.stdout.buffer.flush()
        seconds += chunk.duration
    return seconds


def _read_text(stream: TextIO | None) -> str:
    """All of standard input, which may be closed."""
    try:
        return "" if stream is None else stream.read().strip()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"Standard input is not text in {error.encoding}: {error.reason}. Give it as that."
        ) from error


def _segment(value: str) -> Segment:
    """What argparse makes of FILE:TEXT:SPEAKER; the text may hold colons, the file may be empty."""
    file, _, rest = value.partition(":")
    if len(file) == 1 and rest[:1] in ("\\", "/"):  # a Windows drive
        drive, (file, _, rest) = file, rest.partition(":")
        file = f"{drive}:{file}"
    text, colon, speaker = rest.rpartition(":")
    if not colon or not speaker.strip().isdecimal():
        raise argparse.ArgumentTypeError(
            f"{value!r} is not FILE:TEXT:SPEAKER, for example intro.wav:Hello there.:0 "
            "(an empty FILE is a turn of text alone)"
        )
    return Segment(text, audio=file or None, speaker=int(speaker))


def _alias(value: str) -> tuple[str, str | int]:
    """NAME=VOICE."""
    from aloud.prepare import MAX_SPEAKER

    name, equals, voice = value.partition("=")
    if not equals or not name or not voice:
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=VOICE, as alloy=anna or nova=7")
    if not voice.isdecimal():
        return name, voice
    if not voice.isascii() or int(voice) > MAX_SPEAKER:
        raise argparse.ArgumentTypeError(f"a speaker is from 0 to {MAX_SPEAKER}, got {voice}")
    return name, int(voice)


def _serve(parsed: argparse.Namespace) -> int:
    # Whatever can be wrong is found before the model is loaded, which takes much longer.
    from aloud.server.settings import read_keys, read_origin

    origins = tuple(map(read_origin, parsed.allow_origin))
    keys = () if parsed.api_key_file is None else read_keys(parsed.api_key_file)
    _check_folder(parsed.voices, "--voices")
    _check_folder(parsed.sessions, "--sessions")
    if not 0 <= parsed.drain_seconds <= MAX_DRAIN_SECONDS:
        raise RequestError(f"--drain-seconds is from 0 to {MAX_DRAIN_SECONDS:,}, got {parsed.drain_seconds:g}.")
    if parsed.max_waiting < 0:
        raise RequestError(f"--max-waiting is 0 or more, got {parsed.max_waiting}.")
    if parsed.max_streams is not None and parsed.max_streams < 1:
        raise RequestError(f"--max-streams is 1 or more, got {parsed.max_streams}.")
    try:
        from aloud.server.serve import bind, own_names, serve
        from aloud.server.settings import Settings, default_aliases
        from aloud.server.voices import NAME
    except ModuleNotFoundError as error:
        raise MissingDependency(f"The server needs {error.name}. Install it: pip install 'aloud[server]'") from error
    from aloud.api import Runtime

    for name, voice in parsed.alias:
        if isinstance(voice, str) and NAME.fullmatch(voice) is None:
            raise RequestError(f"--alias {name}: a voice's name is 1 to 64 of a-z, 0-9, _ and -, got {voice!r}.")

    def load() -> Runtime:
        return Runtime.load(
            parsed.model,
            revision=parsed.revision,
            local_files_only=parsed.local_files_only,
            device=parsed.device,
            dtype=parsed.dtype,
            max_streams=parsed.max_streams,
            max_positions=parsed.max_positions,
        )

    sockets = bind(parsed.host, parsed.port)
    hosts = () if keys else own_names(parsed.host)
    settings = Settings(
        keys=keys,
        hosts=hosts,
        origins=origins,
        voices=parsed.voices,
        sessions=parsed.sessions,
        aliases=default_aliases() | dict(parsed.alias),
    )
    return serve(load, settings, sockets, drain_seconds=parsed.drain_seconds, max_waiting=parsed.max_waiting)


def _check_folder(path: Path | None, option: str) -> None:
    """Raise unless it is a folder that can be written to; one that is not there is made."""
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise RequestError(f"{option} is a folder, and {path} is none. Name another.")
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise RequestError(f"{option} is a folder to write to, and {path} may not be. Name another.")


def _inspect(parsed: argparse.Namespace) -> int:
    from aloud.checkpoint.describe import describe
    from aloud.checkpoint.load import find, summarise

    checkpoint = find(parsed.model, revision=parsed.revision, local_files_only=parsed.local_files_only, weights=False)
    print("\n".join(describe(summarise(checkpoint))))
    return 0


def _warm(parsed: argparse.Namespace) -> int:
    stages: list[tuple[str, float]] = []

    def stage(name: str) -> None:
        now = time.perf_counter()
        if stages:
            print(f"{stages[-1][0]:<24}{now - stages[-1][1]:8.2f} s", flush=True)
        stages.append((name, now))

    stage("imports")
    from aloud.api import Runtime

    runtime = Runtime.load(
        parsed.model,
        revision=parsed.revision,
        local_files_only=parsed.local_files_only,
        device=parsed.device,
        dtype=parsed.dtype,
        max_streams=parsed.max_streams,
        max_positions=parsed.max_positions,
        progress=stage,
    )
    runtime.warm(stage)
    stage("total")
    print(f"{'total':<24}{stages[-1][1] - stages[0][1]:8.2f} s")
    if runtime.device.type == "cpu":
        print("On a CPU nothing is compiled or captured: a later start takes the same time.")
    return 0


def _random(parsed: argparse.Namespace) -> int:
    from aloud.checkpoint.random import write_random

    write_random(parsed.folder, parsed.size, seed=parsed.seed, dtype=parsed.dtype)
    return 0


def _bench(parsed: argparse.Namespace) -> int:
    from aloud.benchmarks.__main__ import main as bench

    return bench(parsed.rest)


if __name__ == "__main__":
    sys.exit(main())
