"""The command: what it writes where, its exit codes, and that a user never meets a traceback."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

import aloud
from aloud import Audio, Engine, Guards, Runtime, Segment, live
from aloud.cli import _parser, main
from aloud.engine.slots import MOST_STREAMS
from aloud.errors import StepFailed
from aloud.live_speech import LiveSpeech
from aloud.text.split import split
from oracle import csm as oracle

NOWHERE = "nobody/no-such-model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that the command itself wrote."""
    folder = tmp_path_factory.mktemp("models") / "deeper" / "small"
    assert main(["random", str(folder), "--seed", "7"]) == 0
    return str(folder)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes so far as to load a model has not checked enough before."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Runtime, "load", load)


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command, in this process."""
    try:
        status = main(arguments)
    except SystemExit as leaving:  # argparse's way
        status = int(leaving.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def type_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


# --- speak ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_speak_writes_a_file_and_nothing_else(
    ending: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"out.{ending}"
    arguments = ["speak", "Hello.", "-o", str(path), "--model", model, "--seed", "3", "--max-seconds", "0.8"]
    assert run(arguments, capsys) == (0, "", "")
    samples, rate = soundfile.read(path)
    assert (len(samples), rate) == (19_200, 24_000)
    assert np.abs(samples).max() > 0


def test_every_option_reaches_the_request(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    sound = tmp_path / "voice.wav"
    soundfile.write(sound, oracle.speech_like(0.5, seed), 24_000)
    arguments = ["speak", "Hello.", "-o", str(tmp_path / "out.wav"), "--model", model, "--device", "cpu"]
    arguments += ["--dtype", "float32", "--speaker", "4", "--context", f"{sound}:He said: well, 1:2.:11"]
    arguments += ["--context", ":Text alone.:0", "--seed", "18446744073709551615", "--temperature", "1.1"]
    arguments += ["--top-k", "20", "--depth-temperature", "0.7", "--depth-top-k", "9", "--max-seconds", "0.8"]
    capsys.readouterr()  # the seed fixture prints
    assert run(arguments, capsys) == (0, "", "")
    expected = Runtime.load(model).speak(
        "Hello.",
        speaker=4,
        context=[aloud.Segment("He said: well, 1:2.", sound, 11), aloud.Segment("Text alone.")],
        temperature=1.1,
        top_k=20,
        depth_temperature=0.7,
        depth_top_k=9,
        seed=2**64 - 1,
        max_seconds=0.8,
    )
    written, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    np.testing.assert_allclose(written, expected.samples.clip(-1, 1), atol=1 / 32768)


def test_text_comes_from_standard_input(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "typed.wav", tmp_path / "given.wav"]
    common = ["--model", model, "--seed", "3", "--max-seconds", "0.4"]
    type_in(monkeypatch, "  Grüß dich,\nWelt.\n".encode())
    assert run(["speak", "-", "-o", str(paths[0]), *common], capsys) == (0, "", "")
    assert run(["speak", "Grüß dich,\nWelt.", "-o", str(paths[1]), *common], capsys) == (0, "", "")
    assert paths[0].read_bytes() == paths[1].read_bytes()


TWO = "Here is one sentence, which is short. Here is another one."
LONG = "Nobody has ever said anything as long as this and nothing else. " * 7


@pytest.mark.parametrize("output", ["file", "pipe"])
@pytest.mark.parametrize(
    ("text", "options", "context"),
    [(LONG, [], []), (LONG, ["--max-seconds", "600"], []), (TWO, ["--context", ":Well:0"], [Segment("Well")])],
    ids=["long", "with its longest", "behind a context"],
)
def test_a_text_of_any_length_is_said_to_its_end(
    output: str,
    text: str,
    options: list[str],
    context: list[Segment],
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an engine says it, a sentence behind the other, where one go might not be enough for the whole."""
    short = Guards(text_seconds=0.24, text_seconds_per_byte=0.0)  # a random model goes on for as long as it may
    asked: list[Guards | None] = []
    monkeypatch.setattr(live, "resolve_guards", lambda request: asked.append(request.guards) or short)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    path = "-" if output == "pipe" else str(tmp_path / "out.wav")
    assert main(["speak", text, "-o", path, "--model", model, "--seed", "3", *options]) == 0
    sys.stdout.flush()
    assert capsys.readouterr().err == ""
    assert asked == [Guards()]
    with Engine(Runtime.load(model, max_streams=1)) as engine:
        expected = engine.speak_sync(text, context=context, seed=3).samples.clip(-1, 1 - 1 / 32768)
    data = written.getvalue() if output == "pipe" else soundfile.read(path, dtype="int16")[0].tobytes()
    assert len(expected) == len(split(text)) * 3 * 1920
    np.testing.assert_allclose(np.frombuffer(data, "<i2") / 32768, expected, atol=0.51 / 32768)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(KeyboardInterrupt(), 130, ""), (StepFailed("The device is gone."), 1, "aloud: The device is gone.\n")],
    ids=["Ctrl-C", "error"],
)
@pytest.mark.parametrize("frames", [0, 5])
def test_a_long_text_that_breaks_off_leaves_what_was_said(
    frames: int,
    error: BaseException,
    status: int,
    said: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under another name: what has the one that was asked for is whole."""
    following, left = LiveSpeech.__next__, iter(range(frames))

    def until_then(speech: LiveSpeech) -> Audio:
        if next(left, None) is None:
            raise error
        return following(speech)

    monkeypatch.setattr(LiveSpeech, "__next__", until_then)
    path, kept_path = tmp_path / "out.wav", tmp_path / "out.part.wav"
    path.write_bytes(b"before")
    kept = f"aloud: saving the {0.08 * frames:.1f} s that were said until then as {kept_path}\n" if frames else ""
    command = ["speak", LONG, "-o", str(path), "--model", model, "--seed", "3"]
    assert run(command, capsys) == (status, "", kept + said)
    assert path.read_bytes() == b"before"
    assert kept_path.exists() == bool(frames)
    if not frames:
        return
    monkeypatch.undo()
    with Engine(Runtime.load(model, max_streams=1)) as engine, engine.stream(LONG, seed=3) as speech:
        expected = np.concatenate([next(speech).samples for _ in range(frames)]).clip(-1, 1 - 1 / 32768)
    np.testing.assert_allclose(soundfile.read(kept_path)[0], expected, atol=0.51 / 32768)


@pytest.mark.parametrize("output", ["file", "pipe"])
@pytest.mark.parametrize(("text", "left"), [("Yes.", 30), ("Here is one sentence which is cut off.\n\nYes.", 110)])
def test_speech_that_was_cut_off_says_so(
    output: str,
    text: str,
    left: int,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where nobody sits before a terminal: half of a text would pass for the whole."""
    room = Runtime.load(model).max_positions
    context = f":{'Well ' * ((room - left) // 5)}:0"  # a position for each byte
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    path = "-" if output == "pipe" else str(tmp_path / "out.wav")
    assert main(["speak", text, "-o", path, "--model", model, "--seed", "3", "--context", context]) == 0
    sys.stdout.flush()
    frames = len(written.getvalue()) // 3840 if output == "pipe" else soundfile.info(path).frames // 1920
    said = capsys.readouterr().err
    assert said.startswith(f"aloud: the speech was cut off after {frames * 0.08:.1f} s: no more fits in")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (b"", "aloud: There is no text to say. Give at least one letter.\n"),
        (b" \n\t\n", "aloud: There is no text to say. Give at least one letter.\n"),
        (b"caf\xe9", "aloud: Standard input is not text in utf-8: unexpected end of data. Give it as that.\n"),
        (None, "aloud: There is no text to say. Give at least one letter.\n"),
    ],
    ids=["empty", "blank", "Latin-1", "closed"],
)
def test_standard_input_without_a_text(
    typed: bytes | None, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if typed is None:
        monkeypatch.setattr(sys, "stdin", None)
    else:
        type_in(monkeypatch, typed)
    assert run(["speak", "-", "-o", "out.wav", "--model", NOWHERE], capsys) == (1, "", sentence)


def test_raw_pcm_goes_to_standard_output(model: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    common = ["--model", model, "--seed", "3", "--max-seconds", "0.8"]
    assert main(["speak", "Hello.", "-o", "-", *common]) == 0
    out, err = capfdbinary.readouterr()
    expected = Runtime.load(model).speak("Hello.", seed=3, max_seconds=0.8)
    assert len(out) == 2 * 19_200
    np.testing.assert_allclose(
        np.frombuffer(out, "<i2") / 32768, expected.samples.clip(-1, 1 - 1 / 32768), atol=0.51 / 32768
    )
    assert err == b""


def test_raw_pcm_is_written_frame_by_frame(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    class Pipe(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: memoryview) -> int:  # type: ignore[override]
            written.append(len(data))
            return len(data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Pipe())))
    assert main(["speak", "Hello.", "-o", "-", "--model", model, "--seed", "3", "--max-seconds", "0.8"]) == 0
    assert written == [2 * 1920] * 10


def test_every_error_of_speak_is_a_sentence(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out.wav")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for arguments, sentence in (
        (["-o", "-", "--model", NOWHERE], "Raw PCM goes to a pipe or a file, not to a terminal."),
        (["-o", out, "--model", "no-such-folder"], "'no-such-folder' is not a folder here, and no name on the hub"),
        (["-o", out, "--model", str(tmp_path)], f"{tmp_path} has no config.json"),
        (["-o", out, "--model", model, "--max-seconds", "200"], "The prompt takes "),
        (["-o", out, "--model", model, "--context", f"{model}/config.json:a:0"], f"'{model}/config.json' is not audio"),
        (["-o", out, "--model", model, "--device", "abacus"], "There is no device 'abacus'."),
        (["-o", out, "--model", model, "--dtype", "int4"], "There is no dtype 'int4'"),
    ):
        status, printed, message = run(["speak", "Hello.", *arguments], capsys)
        assert (status, printed) == (1, "")
        assert message.startswith(f"aloud: {sentence}")
        assert message.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["Hello.", "-o", "out.xyz"], "'out.xyz' ends in '.xyz'; use one of .wav, .flac, .ogg, .mp3."),
        (["Hello.", "-o", "out"], "'out' has no ending; use one of .wav, .flac, .ogg, .mp3."),
        (["Hello.", "-o", "/no/such/out.wav"], "'/no/such/out.wav' cannot be saved: there is no folder '/no/such'"),
        (["Hello.", "-o", "folder.wav"], "'folder.wav' cannot be saved: it is a folder"),
        (["", "-o", "out.wav"], "There is no text to say."),
        (["\udcff", "-o", "out.wav"], "The text to say holds '\\udcff' at character 0"),
        (["Hello.", "-o", "out.wav", "--speaker", "-1"], "speaker must be a whole number from 0 to 999, got -1."),
        (["Hello.", "-o", "out.wav", "--seed", "-1"], "seed must be a whole number from 0 to 2^64 - 1, got -1."),
        (["Hello.", "-o", "out.wav", "--temperature", "nan"], "temperature must be 0 (greedy) or from 0.001 to 100"),
        (["Hello.", "-o", "out.wav", "--top-k", "-5"], "top_k must be a whole number"),
        (["Hello.", "-o", "out.wav", "--max-seconds", "0"], "max_seconds must be above 0"),
        (["Hello.", "-o", "out.wav", "--context", "gone.wav:Hi.:0"], "There is no file 'gone.wav'; check the path."),
        (["Hello.", "-o", "out.wav", "--context", "::0"], "A segment has neither text nor audio."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_be_seen_without_a_model_is_said_before_one_is_loaded(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.wav").mkdir()
    status, out, err = run(["speak", *arguments, "--model", NOWHERE], capsys)
    assert (status, out) == (1, "")
    assert err.startswith(f"aloud: {sentence}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "file", "text", "speaker"),
    [
        ("a.wav:Hello.:0", "a.wav", "Hello.", 0),
        ("/x y/a.wav:One: two: three:12", "/x y/a.wav", "One: two: three", 12),
        (":Text alone.:3", None, "Text alone.", 3),
        ("a.wav::1", "a.wav", "", 1),
        (r"C:\voices\a.wav:Hello.:0", r"C:\voices\a.wav", "Hello.", 0),
        ("d:/voices/a.wav:At 10:30.:7", "d:/voices/a.wav", "At 10:30.", 7),
        ("a.wav:Hello.: 5 ", "a.wav", "Hello.", 5),
    ],
)
def test_context_is_parsed(given: str, file: str | None, text: str, speaker: int) -> None:
    parsed = _parser().parse_args(["speak", "x", "-o", "out.wav", "--context", given])
    assert parsed.context == [aloud.Segment(text, file, speaker)]


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a.wav", "a.wav:Hello.", "a.wav:Hello.:", "a.wav:Hello.:x", "a.wav:Hello.:-1", ""])
def test_a_wrong_context_is_wrong_usage(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(["speak", "x", "-o", "out.wav", "--context", given], capsys)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == (
        f"aloud speak: error: argument --context: {given!r} is not FILE:TEXT:SPEAKER, for example "
        "intro.wav:Hello there.:0 (an empty FILE is a turn of text alone)"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["whisper"],
        ["speak"],
        ["speak", "Hello."],
        ["speak", "Hello.", "-o", "a.wav", "--temperature", "hot"],
        ["speak", "Hello.", "-o", "a.wav", "--seed", "1.5"],
        ["speak", "Hello.", "-o", "a.wav", "--loudness", "11"],
        ["random", "folder", "--size", "huge"],
        ["inspect"],
        ["bench"],
        ["bench", "nothing"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(arguments, capsys)
    assert (status, out) == (2, "")
    assert err.startswith("usage: aloud")
    assert "error: " in err.splitlines()[-1]


@pytest.mark.parametrize(
    "command", [[], ["speak"], ["inspect"], ["random"], ["bench"], ["bench", "load"]], ids=" ".join
)
def test_help_goes_to_standard_output(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run([*command, "--help"], capsys)
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: {' '.join(['aloud', *command])}")


@pytest.mark.parametrize("command", ["serve", "warm"])
def test_help_says_how_many_streams_there_are(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = " ".join(run([command, "--help"], capsys)[1].split())
    assert f"(default: what fits, at most {MOST_STREAMS['cuda']}; on a CPU, {MOST_STREAMS['cpu']})" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], capsys) == (0, f"aloud {aloud.__version__}\n", "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("x"), "aloud: KeyError: 'x'\nThis is a fault of the program. Run it again with --debug and report"),
        (OSError(28, "No space left on device"), "aloud: No space left on device\n"),
        (PermissionError(13, "Permission denied", "/x"), "aloud: /x: Permission denied\n"),
        (aloud.errors.OutOfMemory("Too little."), "aloud: Too little.\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("debug", [False, True], ids=["plain", "--debug"])
def test_a_traceback_is_shown_with_debug_only(
    error: Exception, message: str, debug: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Runtime, "load", fail)
    status, out, err = run(["speak", "x", "-o", "x.wav"] + ["--debug"] * debug, capsys)
    assert (status, out) == (1, "")
    assert ("Traceback" in err) is debug
    assert message in err
    assert debug or err.startswith(message)


def test_an_interrupt_is_status_130_and_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runtime, "load", interrupt)
    assert run(["speak", "x", "-o", "x.wav"], capsys) == (130, "", "")


# --- inspect, random, bench -------------------------------------------------------------------------------------------


def test_inspect_tells_sizes_and_counts_what_the_file_holds(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(["inspect", model], capsys)
    assert (status, err) == (0, "")
    lines = {line[:16].strip(): line[16:].strip() for line in out.splitlines() if line[0] != " "}
    assert lines["model"] == "small (csm)"
    assert lines["layout"].startswith("transformers', 1 safetensors file, ")
    assert lines["backbone"].startswith("3 layers of 128, feed-forward 256, 8 query and 2 key/value heads of 16")
    assert lines["codebooks"] == "8 of 259 tokens, 256 of them drawable"
    assert "temperature 0.9, top-k 50" in lines["sampling"]

    index = json.loads((Path(model) / "model.safetensors.index.json").read_text())
    (shard,) = {*index["weight_map"].values()}
    size = int.from_bytes((Path(model) / shard).read_bytes()[:8], "little")
    header = json.loads((Path(model) / shard).read_bytes()[8 : 8 + size])
    counts = {name: int(np.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__"}
    codec = sum(count for name, count in counts.items() if name.startswith("codec_model."))
    table = {line.split("  ")[1].strip(): line.split()[-1] for line in out.splitlines() if line.startswith("  ")}
    assert int(table["codec"].replace(",", "")) == codec
    assert int(table["text embedding"].replace(",", "")) == counts["embed_text_tokens.weight"]
    # The file holds the tied embedding under both of its names.
    tied = counts["depth_decoder.model.embed_tokens.weight"]
    assert int(table["total"].replace(",", "")) == sum(counts.values()) - tied


def test_inspect_of_sesames_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "backbone_flavor": "llama-1B",
        "decoder_flavor": "llama-100M",
        "text_vocab_size": 128_256,
        "audio_vocab_size": 2051,
        "audio_num_codebooks": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"text_embeddings.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    status, out, err = run(["inspect", str(tmp_path)], capsys)
    assert (status, err) == (0, "")
    assert "layout          Sesame's, 1 safetensors file, 0.000 GB" in out
    assert "  backbone          973,146,112" in out  # 973.1 M in its layers
    assert "context         2048 positions, 164 s of audio" in out


def test_inspect_of_a_wrong_folder_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    status, out, err = run(["inspect", str(tmp_path)], capsys)
    assert (status, out) == (1, "")
    assert err.startswith('aloud: config.json says model_type "llama"')


def test_random_is_the_same_for_the_same_seed(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["random", str(tmp_path / "again"), "--seed", "7"], capsys) == (0, "", "")
    assert run(["random", str(tmp_path / "other"), "--seed", "8", "--dtype", "bfloat16"], capsys) == (0, "", "")
    files = sorted(os.listdir(model))
    assert files == sorted(os.listdir(tmp_path / "again"))
    for name in files:
        assert (Path(model) / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    (shard,) = (name for name in files if name.endswith(".safetensors"))
    assert (tmp_path / "other" / shard).stat().st_size < 0.6 * (Path(model) / shard).stat().st_size


def test_random_where_a_folder_cannot_be_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = run(["random", str(tmp_path / "file" / "model")], capsys)
    assert (status, err) == (1, f"aloud: {tmp_path / 'file' / 'model'}: Not a directory\n")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("frame --rows 0", "needs 1 row or more"),
        ("frame --rows 1 --context 1", "and 2 positions of context"),
        ("frame --device cpu --rows 1 --voice 5", "A voice of 5 positions has no room for sound behind"),
        ("host --streams -1", "needs 1 stream or more"),
        ("kernels --rows 8 0", "needs 1 row or more"),
        ("kernels --repeats 0", "and 1 repeat or more"),
        ("mechanics --repeats 0", "needs 1 repeat or more"),
        ("peers --frames 1", "needs 2 frames or more"),
        ("serving --seconds 0", "rates and seconds above 0"),
        ("aot --processes 0", "needs 1 process or more"),
        ("load --model /nowhere", "The folder '/nowhere' does not exist"),
    ],
)
def test_bench_refuses_what_cannot_be_measured(
    model: str, command: str, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    suite = command.split()
    if "--voice" in suite:
        suite += ["--model", model, "--dtype", "float32"]
    assert main(["bench", *suite]) == 1
    error = capfd.readouterr().err
    assert sentence in error
    assert "fault of the program" not in error


def test_bench_load_prints_a_table_and_one_document(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "load", "--model", model, "--dtypes", "bfloat16"]) == 0
    out, _ = capfd.readouterr()
    document = json.loads(out.splitlines()[-1])
    assert document["suite"] == "load"
    (result,) = document["results"]
    assert result["dtype"] == "bfloat16"
    assert result["weight_bytes"] > 1e6
    assert out.startswith("dtype ")


# --- as a process -----------------------------------------------------------------------------------------------------


COMMAND = [sys.executable, "-m", "aloud.cli", "speak", "Hello.", "-o", "-", "--max-seconds", "80", "--seed", "1"]
# Buffered, as a user's Python is: what is left in the buffer at the end is where things go wrong.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_on_a_terminal_it_streams_shows_a_bar_and_ends_at_control_c(model: str) -> None:
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, "--model", model],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=BUFFERED,
        # A shell's background jobs ignore SIGINT, and so do their children unless told otherwise.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(terminal)
    shown = bytearray()

    def watch() -> None:
        while True:
            try:
                data = os.read(screen, 1000)
            except OSError:  # the terminal's other end is closed
                return
            if not data:
                return
            shown.extend(data)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert process.stdout is not None
        first = process.stdout.read(2 * 1920 * 5)  # five frames, of a thousand
        assert len(first) == 2 * 1920 * 5
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        watcher.join(60)
        os.close(screen)
    assert len(rest) < 2 * 1920 * 900
    assert b"s of audio in 00:0" in shown
    assert b"x real time" in shown
    assert b"Traceback" not in shown
    assert b"aloud:" not in shown


def test_control_c_in_a_long_text_leaves_what_was_said(model: str, tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    command = [sys.executable, "-m", "aloud.cli", "speak", 10 * LONG, "-o", str(path), "--model", model, "--seed", "1"]
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    process = subprocess.Popen(
        command, stderr=terminal, env=BUFFERED, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    os.close(terminal)
    shown = bytearray()
    is_stopped = False
    try:
        while True:
            try:
                shown.extend(os.read(screen, 1000))
            except OSError:  # the terminal's other end is closed
                break
            # Its bar shows that something was said.
            if not is_stopped and re.search(rb"[1-9]\.\d s of audio", shown):
                process.send_signal(signal.SIGINT)
                is_stopped = True
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(screen)
    assert not path.exists()
    kept = tmp_path / "out.part.wav"
    seconds = soundfile.info(kept).duration
    counted = [float(number) for number in re.findall(rb"([\d.]+) s of audio", shown)]
    assert seconds > max(counted) - 0.05  # the bar shows tenths
    # On a line of its own, behind the bar.
    said = f"\naloud: saving the {seconds:.1f} s that were said until then as {kept}\r\n"
    assert shown.decode().endswith(said)


def test_a_reader_that_leaves_ends_it_quietly(model: str) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--model", model], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert len(process.stdout.read(100)) == 100
    process.stdout.close()
    assert process.stderr.read() == b""  # and no bar, for it is no terminal
    assert process.wait(60) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_full_disk_is_a_sentence(model: str) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "aloud.cli", "inspect", model]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=BUFFERED, check=False)
    assert (done.returncode, done.stderr) == (1, b"aloud: No space left on device\n")
