"""From text to codes on kernels that were compiled for a GPU: what the CPU's own operations say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aloud import Request, Runtime, Segment
from aloud.kernels.launch import Launch
from oracle import csm as oracle
from ptx_machine.launches import Chain

pytestmark = pytest.mark.machine


@pytest.mark.parametrize("context_seconds", [[0.3, 0.5, 0.9], [5.5]], ids=["three streams", "a long prompt"])
def test_speech_is_the_same(
    context_seconds: list[float],
    version: int,
    act_as_on_a_gpu: Callable[[], None],
    chain: Chain,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seed: int,
) -> None:
    """Greedy and drawn, through the API: prompts of few and of more positions than 64, and frames."""
    config = oracle.small_config(codebooks=4, rope=oracle.LLAMA3, depth_rope=oracle.DEPTH_LLAMA3, positions=200)
    folder = oracle.save(oracle.random_model(config, seed=3), tmp_path)
    requests = [
        Request(
            "Hello there. " * (1 + stream),
            context=[Segment("Hi. How are you?", audio=oracle.speech_like(seconds, seed), speaker=1)],
            temperature=0.9 * (stream % 2),
            depth_temperature=0.8 * (stream % 2),
            seed=stream,
            max_seconds=0.16,
        )
        for stream, seconds in enumerate(context_seconds)
    ]

    def speak() -> list[torch.Tensor]:
        runtime = Runtime.load(folder, device="cpu", max_streams=len(requests), max_positions=200)
        return [torch.as_tensor(audio.codes) for audio in runtime.speak_batch(requests)]

    expected = speak()
    act_as_on_a_gpu()
    launched: Counter[str] = Counter()
    run = Launch.run

    def count(launch: Launch) -> None:
        launched[launch.kernel.__name__] += 1
        run(launch)

    monkeypatch.setattr(Launch, "run", count)
    ours = speak()
    assert all(torch.equal(*codes) for codes in zip(ours, expected, strict=True))
    assert {"embed_prompt_kernel", "begin_frame_kernel", "end_frame_kernel", "join_output_kernel"} <= set(launched)
    assert ("rotate_qkv_kernel" in launched) == (max(context_seconds) > 5)  # around a library's products
    assert chain.written
    assert bool(chain.read_early) == (version >= 90)  # weights, before the wait for the kernel before
    assert not chain.conflicts()
