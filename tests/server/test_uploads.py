"""Audio from clients: decoded as far as is allowed and no further, from the bytes that were sent and nothing else."""

from __future__ import annotations

import http.server
import resource
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from aloud.errors import AudioEmpty, AudioInvalid, AudioRateInvalid, AudioTooLong, AudioUnreadable
from aloud.server.uploads import decode_audio
from oracle.csm import speech_like
from server.running import RATE, Running, encoded, wav

FILES = {
    "wav": lambda samples: wav(samples),
    "wav-float": lambda samples: wav(samples, subtype="FLOAT"),
    "flac": lambda samples: wav(samples, format="FLAC"),
    "mp3": lambda samples: wav(samples, format="MP3"),
    "ogg-vorbis": lambda samples: wav(samples, format="OGG"),
    "ogg-opus": lambda samples: encoded(samples.repeat(2), "ogg", "libopus"),
    "webm": lambda samples: encoded(samples.repeat(2), "webm", "libopus"),
    "mp4": lambda samples: encoded(samples, "mp4", "aac", rate=RATE),
    "aac": lambda samples: encoded(samples, "adts", "aac", rate=RATE),
}


@pytest.mark.parametrize("kind", FILES)
def test_formats(kind: str, seed: int) -> None:
    samples = speech_like(0.5, seed)
    read = decode_audio(FILES[kind](samples), RATE, 10)
    assert read.dtype == np.float32
    assert abs(len(read) - len(samples)) < 3500
    if kind in ("wav", "wav-float", "flac"):
        np.testing.assert_allclose(read, samples, atol=1 / 32768)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000, 192_000])
def test_rates_and_channels(rate: int, seed: int) -> None:
    stereo = np.stack([speech_like(0.5, seed, rate)] * 2, axis=1)
    assert abs(len(decode_audio(wav(stereo, rate), RATE, 10)) - RATE / 2) < 100


def test_the_limit_is_to_the_sample() -> None:
    assert len(decode_audio(wav(np.zeros(RATE)), RATE, 1.0)) == RATE
    with pytest.raises(AudioTooLong):
        decode_audio(wav(np.zeros(RATE + 1)), RATE, 1.0)
    with pytest.raises(AudioTooLong):
        decode_audio(wav(np.zeros(48_002), 48_000), RATE, 1.0)


def test_nothing_in_it() -> None:
    with pytest.raises(AudioEmpty):
        decode_audio(wav(np.zeros(0)), RATE, 1.0)
    for data in (b"", b"RIFF", b"no audio at all " * 100, bytes(5000)):
        with pytest.raises(AudioUnreadable):
            decode_audio(data, RATE, 1.0)


@pytest.mark.parametrize("rate", [1, 100, 7_999, 192_001, 4_000_000])
def test_rates_that_make_one_frame_an_hour(rate: int) -> None:
    with pytest.raises(AudioRateInvalid):
        decode_audio(wav(np.zeros(4096), rate, subtype="PCM_U8"), RATE, 60.0)


BOMB = """
import resource, sys
from aloud.errors import AudioTooLong
from aloud.server.uploads import decode_audio
import numpy as np
decode_audio(open(sys.argv[2], "rb").read(), 24_000, 60.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_audio(open(sys.argv[1], "rb").read(), 24_000, 60.0)
except AudioTooLong:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["opus", "flac"])
def test_a_small_file_does_not_become_gigabytes(kind: str, tmp_path: Path) -> None:
    """Silence that would be 500 MB and more takes less than 40."""
    if kind == "opus":
        data = encoded(np.zeros(30 * 48_000, np.float32), "ogg", "libopus") * 240  # links of a chain
    else:
        data = wav(np.zeros(7200 * 24_000, np.int16), format="FLAC")
    assert len(data) < 30_000_000
    (tmp_path / "bomb").write_bytes(data)
    (tmp_path / "fine").write_bytes(wav(np.zeros(48_000), 48_000))
    command = [sys.executable, "-c", textwrap.dedent(BOMB), str(tmp_path / "bomb"), str(tmp_path / "fine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert 0 <= int(done.stdout) < 40_000, "KiB"


@pytest.fixture
def asked_for() -> list[str]:
    return []


def test_playlists_are_not_followed(asked_for: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to addresses nor to files of the machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked_for.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "private.wav").write_bytes(wav(np.full(RATE, 0.5)))
    monkeypatch.chdir(tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{elsewhere.server_port}/x"
        for target in (address, address + ".ts", "private.wav", f"file:{tmp_path}/private.wav"):
            for text in (
                f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
                f"ffconcat version 1.0\nfile {target}\n",
                f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\na=control:{target}\n",
            ):
                with pytest.raises(AudioUnreadable):
                    decode_audio(text.encode(), RATE, 60.0)
        elsewhere.shutdown()
    assert asked_for == []


@pytest.mark.parametrize("kind", FILES)
def test_corrupted_files(kind: str, seed: int) -> None:
    """Cut short, with wrong bits, with a stretch of noise: read or refused, in time, and never anything else."""
    random = np.random.default_rng(seed)
    whole = np.frombuffer(FILES[kind](speech_like(0.4, seed)), np.uint8)
    began = time.monotonic()
    for attempt in range(60):
        data = whole.copy()
        if attempt % 3 == 0:
            data = data[: random.integers(len(data))]
        elif attempt % 3 == 1:
            places = random.integers(0, min(len(data), 400 if attempt % 2 else len(data)), random.integers(1, 30))
            data[places] ^= (1 << random.integers(0, 8, len(places))).astype(np.uint8)
        else:
            start, size = random.integers(len(data)), random.integers(1, 500)
            data[start : start + size] = random.integers(0, 256, len(data[start : start + size]), np.uint8)
        try:
            read = decode_audio(data.tobytes(), RATE, 10.0)
        except AudioInvalid:
            continue
        assert len(read) <= 10 * RATE, attempt
        assert np.isfinite(read).all(), attempt
    assert time.monotonic() - began < 20


def test_corrupted_files_over_http(server: Running, seed: int) -> None:
    """One answer each: a voice, or 400."""
    random = np.random.default_rng(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with server.client() as client:
        for attempt, kind in enumerate(list(FILES) * 2):
            data = bytearray(FILES[kind](speech_like(0.3, seed)))
            if attempt < len(FILES):
                del data[random.integers(len(data)) :]
            else:
                data[random.integers(min(len(data), 200))] ^= 1 << random.integers(8)
            files = {"audio_sample": ("voice", bytes(data), "audio/wav")}
            answer = client.post("/v1/audio/voices", data={"name": f"v{attempt}", "consent": "Yes."}, files=files)
            assert answer.status_code in (201, 400), (kind, attempt, answer.text)
            if answer.status_code == 400:
                assert answer.json()["error"]["code"].startswith("Audio"), answer.text
                assert "/" not in answer.json()["error"]["message"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KiB"


def test_names_that_are_no_utf_8_do_not_matter(seed: int) -> None:
    data = wav(speech_like(0.5, seed))
    title = b"INFOINAM" + struct.pack("<I", 4) + "für ".encode("latin-1")
    chunk = b"LIST" + struct.pack("<I", len(title)) + title
    end = data.index(b"data")
    named = data[:4] + struct.pack("<I", len(data) - 8 + len(chunk)) + data[8:end] + chunk + data[end:]
    assert np.array_equal(decode_audio(named, RATE, 1.0), decode_audio(data, RATE, 1.0))
