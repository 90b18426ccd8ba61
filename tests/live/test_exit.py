"""Leaving a process while something speaks, and forking one: an end or a sentence, never an abort and never a wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from oracle import csm as oracle

LIMIT_SECONDS = 40.0
LEAVING_SECONDS = 5.0
"""From the last line of a program until its process is gone: a frame of the small model takes milliseconds."""
BEGINNING = """
import atexit, faulthandler, sys, threading, time

faulthandler.dump_traceback_later(25, exit=True)

late_calls = []
atexit.register(lambda: [call() for call in late_calls])  # the first to be registered is the last to be called
from aloud import Engine, Runtime, Segment, errors
import torch

torch.set_num_threads(1)


def leave():
    print(time.time(), flush=True)


runtime = Runtime.load(sys.argv[1], device="cpu", max_streams=2)
LONG = "hello " * 100
"""


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    seed: int = request.config.getoption("--seed")
    return oracle.save(oracle.random_model(oracle.small_config(), seed), tmp_path_factory.mktemp("checkpoint"))


def ran(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own; what takes too long hangs, and is ended with all that it has forked."""
    command = [sys.executable, "-c", BEGINNING + textwrap.dedent(program), str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


SPEAKING = """
def begun():
    speech = engine.stream(LONG, pace="full")
    next(speech)
    return speech

engine = Engine(runtime)
"""
PROGRAMS = {
    "an error in the loop": (SPEAKING + "for chunk in begun():\n    leave()\n    raise ValueError('mine')", 1),
    "a speech that is still held": (SPEAKING + "speech = begun()\nleave()", 0),
    "an interrupt in asyncio": (
        SPEAKING
        + """
import asyncio, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
async def main():
    async for chunk in engine.stream(LONG, pace="full"):
        leave()
        signal.raise_signal(signal.SIGINT)
try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(9)
""",
        9,
    ),
    "a daemon thread that speaks with an engine": (
        SPEAKING
        + """
def talk():
    while True:
        with engine.stream("hello", max_seconds=4.0, pace="full") as speech:
            list(speech)
threading.Thread(target=talk, daemon=True).start()
time.sleep(0.3)
leave()
""",
        0,
    ),
    "a daemon thread that speaks without one": (
        """
def talk():
    while True:
        list(runtime.stream("hello", max_seconds=4.0))
threading.Thread(target=talk, daemon=True).start()
time.sleep(0.3)
leave()
""",
        0,
    ),
    "what closes the engine at the end": (
        SPEAKING + "atexit.register(engine.close)\nspeech = begun()\nleave()",
        0,
    ),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_leaving_while_something_speaks(program: tuple[str, int], folder: Path) -> None:
    source, status = program
    done = ran(source, folder)
    now = time.time()
    assert done.returncode == status, done.stderr
    assert "terminate called" not in done.stderr
    assert "Exception in thread" not in done.stderr
    assert "EngineClosed" not in done.stderr
    assert now - float(done.stdout.split()[0]) < LEAVING_SECONDS


def test_who_asks_when_the_process_ends_is_told(folder: Path) -> None:
    program = """
    engine = Engine(runtime)
    speech = engine.stream(LONG, pace="full")
    next(speech)
    def late():
        for ask in (lambda: runtime.speak("Hi."), lambda: engine.speak_sync("Hi."), lambda: [*speech, *speech]):
            try:
                ask()
            except errors.EngineClosed as error:
                print(error, flush=True)
    late_calls.append(late)
    """
    done = ran(program, folder)
    assert done.returncode == 0, done.stderr
    sentence = "The process ends: nothing is spoken any more. Speak before it does."
    assert done.stdout.splitlines() == [sentence] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_what_a_forked_process_cannot_do_is_said_at_once(folder: Path) -> None:
    program = """
    import asyncio, os
    engine = Engine(runtime)
    speech = engine.stream(LONG, pace="full")
    next(speech)
    session = engine.session()
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        engine.close()
        print(len(runtime.speak("Hi.", max_seconds=0.16).codes))  # the parent is as it was
        sys.exit(os.waitstatus_to_exitcode(status))
    for ask in (
        lambda: engine.speak_sync("Hi."),
        lambda: asyncio.run(engine.speak("Hi.")),
        lambda: list(speech),
        lambda: session.hear_sync("Hi."),
        lambda: session.speak_sync("Hi."),
        lambda: engine.drain_sync(),
        engine.check_health,
        lambda: runtime.speak("Hi."),
        lambda: list(runtime.stream("Hi.")),
        lambda: runtime.voice([Segment("Hi.")]),
        lambda: Engine(runtime),
    ):
        try:
            ask()
        except errors.EngineClosed as error:
            print(error, flush=True)
    engine.close()
    sys.stdout.flush()
    os._exit(5)  # as a process of multiprocessing ends
    """
    done = ran(program, folder)
    assert done.returncode == 5, done.stderr
    said = done.stdout.splitlines()
    assert (
        said[:-1]
        == [
            "The engine was started before the process was forked, and threads do not survive that. "
            "Load the Runtime and make the Engine after the fork."
        ]
        * 11
    )
    assert said[-1] == "2"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_process_that_was_forked_while_nothing_ran_speaks(folder: Path) -> None:
    program = """
    import os
    with Engine(runtime) as engine:
        expected = engine.speak_sync("Hi.", seed=1, max_seconds=0.16)
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert (runtime.speak("Hi.", seed=1, max_seconds=0.16).codes == expected.codes).all()
    with Engine(runtime) as engine:
        assert (engine.speak_sync("Hi.", seed=1, max_seconds=0.16).codes == expected.codes).all()
    os._exit(5)
    """
    done = ran(program, folder)
    assert done.returncode == 5, done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs to see the system's threads")
def test_nothing_is_left_of_a_closed_engines_threads(folder: Path) -> None:
    """Behind the last line of Python, libraries tidy up, and one that holds a lock then holds it in a fork for ever."""
    program = """
    import asyncio, ctypes, io, os
    import numpy, soundfile

    libc = ctypes.CDLL(None)
    key = ctypes.c_uint()
    assert libc.pthread_key_create(ctypes.byref(key), libc.usleep) == 0  # what tidies up, and takes its time
    seen = {}

    def tidies_up(seconds):
        libc.pthread_setspecific(key, ctypes.c_void_p(int(seconds * 1e6)))
        seen[threading.current_thread().name.rstrip("_0123456789")] = threading.get_native_id()

    class Sound(io.BytesIO):
        def read(self, size=-1):
            tidies_up(0.6)  # longer than the other, so that its end is not waited for by accident
            return super().read(size)

    file = io.BytesIO()
    soundfile.write(file, numpy.zeros(4_800), 24_000, format="WAV")
    engine = Engine(runtime)
    engine.loop.listen(lambda: tidies_up(0.2))
    context = [Segment("Hi.", Sound(file.getvalue()))]
    asyncio.run(engine.speak("Hi.", context=context, max_seconds=0.16))
    assert set(seen) == {"aloud-engine", "aloud-encode"}, seen
    assert all(os.path.exists(f"/proc/self/task/{thread}") for thread in seen.values())
    engine.close()
    sys.exit(5 + sum(os.path.exists(f"/proc/self/task/{thread}") for thread in seen.values()))
    """
    done = ran(program, folder)
    assert done.returncode == 5, done.stderr
