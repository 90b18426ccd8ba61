"""What a server is started with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from aloud.errors import RequestError

OPENAI_VOICES = (
    "alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse",
)  # fmt: skip
"""Names that OpenAI's clients send, some of which send no other."""

ORIGIN = re.compile(r"(https?)://((?:[a-z0-9_-]+\.)*[a-z0-9_-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?/?")
"""A site: scheme, name or address, port."""


@dataclass(frozen=True)
class Limits:
    """What a client may ask for and how long it may take."""

    body_bytes: int = 30_000_000
    text_characters: int = 20_000
    sample_seconds: float = 60.0  # of a voice's sample or a turn's audio
    context_turns: int = 64  # of one request
    context_seconds: float = 120.0  # of the audio of all of them
    voices: int = 100  # that one key may keep
    sessions: int = 100  # that one key may have at once
    session_seconds: float = 900.0  # without a request, or in a file without a turn, after which one is forgotten
    json_parts: int = 200_000  # objects, lists and what they hold, in a body that is not a form
    read_seconds: float = 30.0  # between two parts of a request's body
    body_seconds: float = 300.0  # for all of it
    write_seconds: float = 30.0  # that a client may take to read what is sent
    lead_seconds: float = 10.0  # that a response may run ahead of being played
    cached_voices: int = 256  # that stay read, of all keys


@dataclass(frozen=True)
class Settings:
    """A server's name for its model, its keys, its voices and its limits."""

    model: str | None = None  # what clients know it by; None: its name on the hub, or its folder's
    keys: tuple[str, ...] = ()  # none: everybody may come
    hosts: tuple[str, ...] = ()  # names that it answers to, without ports; none: any
    origins: tuple[str, ...] = ()  # of `read_origin`: other sites whose pages may ask
    voices: Path | None = None  # folder; None: voices are kept until the process ends
    sessions: Path | None = None  # folder, which several servers may share; None: in memory alone
    aliases: dict[str, str | int] = field(default_factory=lambda: default_aliases())
    limits: Limits = field(default_factory=Limits)


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; lines that are blank or begin with # are none.

    Raises a `RequestError` when there are no keys, and `OSError`.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not text in UTF-8. Write a key a line.") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise RequestError(f"There is no key in {path}. Write one a line, or do without a key file.")
    if not all(key.isascii() for key in keys):
        raise RequestError(f"A key in {path} has letters that headers cannot carry. Use ASCII.")
    return keys


def read_origin(site: str) -> str:
    """A site as browsers name it when its pages ask (RFC 6454): `https://app.example`, `http://localhost:3000`.

    Raises a `RequestError` when it is none.
    """
    wrong = RequestError(f"A site is named as https://app.example or http://localhost:3000, and not as {site!r}.")
    match = ORIGIN.fullmatch(site.strip().lower())
    if match is None:
        raise wrong
    scheme, name, port = match.groups()
    try:
        if name.startswith("["):
            name = f"[{ip_address(name[1:-1]).compressed}]"
        elif name.rpartition(".")[2].isdecimal():  # browsers read it as an address, and write it in full
            name = ip_address(name).compressed
    except ValueError as error:
        raise wrong from error
    number = None if port is None else int(port)
    if number is not None and not 0 < number < 65_536:
        raise wrong
    is_said = number not in (None, {"http": 80, "https": 443}[scheme])
    return f"{scheme}://{name}" + (f":{number}" if is_said else "")


def default_aliases() -> dict[str, str | int]:
    """OpenAI's voice names as speakers of the model; another alias may name a registered voice."""
    return {name: number for number, name in enumerate(OPENAI_VOICES)}
