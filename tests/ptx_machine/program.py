"""The text of a PTX kernel, taken apart: instructions with their operands, labels, parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Register:
    """A register of each thread, or one of the numbers that a thread is known by, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Number:
    """A number in the text, as its bits; negative ones as they are."""

    bits: int


@dataclass(frozen=True)
class Name:
    """A label, a parameter, or the beginning of shared memory."""

    text: str


@dataclass(frozen=True)
class Address:
    """A place in memory: what it is counted from, and bytes."""

    base: Register | Name
    offset: int


@dataclass(frozen=True)
class Vector:
    """Registers side by side."""

    registers: tuple[Register | Number, ...]


Operand = Register | Number | Name | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """One instruction; where it came from is for messages."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None  # it runs in threads where this holds
    unless: bool  # or does not hold
    text: str
    source: str  # the kernel's file and line

    def __str__(self) -> str:
        """As it stands in the text, and the line of the kernel."""
        return f"`{self.text}` of {self.source}"


@dataclass(frozen=True)
class Program:
    """A kernel."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int] = field(hash=False)


def parse(text: str) -> Program:
    """Take the only kernel of a PTX module apart.

    Raises:
        ValueError: something in it is not known here.
    """
    head = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*\.reqntid (\d+)\s*(?:\.\w+ [\d, ]+\s*)*\{", text, re.DOTALL)
    if head is None:
        raise ValueError("no kernel with a number of threads in this text")
    parameters = re.findall(r"(\w+_param_\d+)", head[2])
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = head[1]
    for line in text[head.end() :].splitlines():
        if line == "}":
            break
        if line.lstrip().startswith(".loc"):
            source = line.partition("//")[2].strip() or source
            continue
        code = line.partition("//")[0].strip()
        if label := re.fullmatch(r"([$\w]+):", code):
            labels[label[1]] = len(instructions)
        elif code.endswith((";", "}")):
            for statement in (re.sub(r"^\{\s*\.reg|\}$", ".reg", code) if ".reg" in code else code).split(";"):
                if statement.strip() and not statement.strip().startswith("."):
                    instructions.append(_instruction(statement.strip(), source))
        elif code and not code.startswith((".", "//")):
            raise ValueError(f"not an instruction: {code!r}")
    return Program(head[1], tuple(parameters), int(head[3]), tuple(instructions), labels)


def _instruction(text: str, source: str) -> Instruction:
    parts = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
    if parts is None:
        raise ValueError(f"not an instruction: {text!r}")
    unless, guard, opcode, operands = parts.groups()
    items = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)
    return Instruction(
        opcode,
        tuple(_operand(item.strip()) for item in items),
        Register(guard) if guard else None,
        unless == "!",
        text,
        source,
    )


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_value(item.strip()) for item in text[1:-1].split(",")))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        start = _operand(base.strip())
        if not isinstance(start, Register | Name):
            raise ValueError(f"not an address: {text!r}")
        return Address(start, int(offset or "0", 0))
    if re.fullmatch(r"%[\w.]+|tmp", text):
        return Register(text)
    if re.match(r"-?\d", text):
        return _value(text)
    return Name(text)


def _value(text: str) -> Register | Number:
    if text.startswith("%") or text in ("tmp", "_"):  # the last is where nothing is kept
        return Register(text)
    if text[:2].lower() in ("0f", "0d"):
        return Number(int(text[2:], 16))
    return Number(int(text.rstrip("U"), 0))
