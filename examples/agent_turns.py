"""A voice agent's side of a conversation: turns that are not read again, text as an LLM sends it, and an interruption.

python agent_turns.py --model sesame/csm-1b -o conversation.wav
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator

from aloud import Audio, Engine, Runtime, Segment

QUESTIONS = ("Hello, who is there?", "What can you do?", "Stop, that is enough. Bye!")
ANSWERS = (
    "Hi! I am the voice of this machine.",
    "Well, a lot of things. I can read to you, for hours if you like, and I never grow tired of it.",
    "Bye, then.",
)
INTERRUPTED = 1  # the answer that the user does not want to hear to its end
PATIENCE_SECONDS = 1.6


async def llm(question: str) -> AsyncIterator[str]:
    """An answer word by word; put your model's stream here."""
    for word in ANSWERS[QUESTIONS.index(question)].split():
        await asyncio.sleep(0.01)
        yield word + " "


async def converse(engine: Engine, voice_file: str | None, seed: int | None) -> list[Audio]:
    """Answer all questions -> what was heard of the answers, in chunks of 80 ms."""
    voice = engine.runtime.voice([Segment("This is how I sound.", voice_file)]) if voice_file else None
    session = engine.session(voice=voice)
    heard: list[Audio] = []
    for turn, question in enumerate(QUESTIONS):
        await session.hear(question)  # with audio=..., the user's own sound is context, too
        begin = len(heard)
        # To be played, the pace is "realtime", which keeps ahead of the player and leaves time for others.
        async with session.stream(llm(question), seed=seed, pace="full") as speech:
            async for chunk in speech:
                heard.append(chunk)
                heard_seconds = (len(heard) - begin) * chunk.duration  # from the player, where there is one
                if turn == INTERRUPTED and heard_seconds >= PATIENCE_SECONDS:
                    speech.interrupt(heard_seconds)  # the session remembers what was heard, and no more
        print(f"{question} -> {(len(heard) - begin) * 0.08:.1f} s, {speech.finish_reason}")
    print(session.stats)
    return heard


async def main() -> None:
    """Converse and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a name on the hub or a folder")
    parser.add_argument("-o", "--output", default="conversation.wav")
    parser.add_argument("--voice", help="a recording of the words: This is how I sound.")
    parser.add_argument("--seed", type=int)
    given = parser.parse_args()
    async with Engine(Runtime.load(given.model)) as engine:
        heard = await converse(engine, given.voice, given.seed)
    Audio.concatenate(heard).save(given.output)


if __name__ == "__main__":
    asyncio.run(main())
