"""Machine code of compiled kernels: their memory and dependency instructions, each with the source line it comes from.

NVIDIA's disassembler takes a third of a second to start, several times what it takes for a kernel, and takes one file.
So the code of many kernels is laid end to end and disassembled at once, as bare instructions; where each comes from is
in the binary's own table of lines (DWARF 2, section 6.2), which the disassembler would read for one kernel alone.
"""

from __future__ import annotations

import inspect
import linecache
import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

LOADS = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")
KEPT = (*LOADS, "STG", "RED", "REDG", "ATOM", "ATOMG", "LDL", "STL", "PREEXIT", "ACQBULK")
COPY_ENGINE_BYTES = 16  # it has no threads, and no narrow way


@dataclass(frozen=True)
class Instruction:
    """One memory or dependency instruction of the machine code."""

    name: str  # LDG, LDGSTS, STG, LDL, STL, PREEXIT, ACQBULK, ...
    bytes: int  # a thread; 0 where the instruction has no width
    weight: bool  # it loads weights

    def __str__(self) -> str:
        """The name, its width in bits, and whether weights are loaded: `LDG.128(weight)`."""
        return f"{self.name}{f'.{8 * self.bytes}' if self.bytes else ''}{'(weight)' if self.weight else ''}"


@dataclass(frozen=True)
class Row:
    """One row of the table of lines: instructions from this address on, up to the next row's, come from this line."""

    address: int
    file: str
    line: int


def cuda_tool(name: str, binary: bytes, *options: str) -> str:
    """Output of one of the CUDA tools that come with Triton, on a file that holds `binary`."""
    path = Path(inspect.getfile(triton)).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([path, *options, file.name], check=True, capture_output=True, text=True).stdout


def read_instructions(cubins: Sequence[bytes], capability: int) -> list[tuple[Instruction, ...]]:
    """The memory and dependency instructions of each kernel, in the order of its machine code.

    Args:
        cubins: binaries of one kernel each, with line information.
        capability: compute capability (90 for 9.0) that all of them were compiled for.

    Raises:
        ValueError: a binary has not the form that this reads.
    """
    sections = [sections_of(cubin) for cubin in cubins]
    codes = [_code(named) for named in sections]
    if not codes:
        return []
    architecture = f"SM{capability}{'a' if capability >= 90 else ''}"
    listing = cuda_tool("nvdisasm", b"".join(codes), "--binary", architecture)
    found = list(read_listing(listing))
    instructions, start = [], 0
    for named, code in zip(sections, codes, strict=True):
        end = start + len(code)
        rows = read_lines(named[".debug_line"])
        instructions.append(
            tuple(
                Instruction(name, width, name in LOADS and _reads_weight(row_at(rows, address - start)))
                for address, name, width in found
                if start <= address < end
            )
        )
        start = end
    return instructions


def read_listing(listing: str) -> Iterator[tuple[int, str, int]]:
    """Address, name and bytes a thread of the memory and dependency instructions of nvdisasm's listing."""
    for match in re.finditer(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE):
        name, *modifiers = match[2].split(".")
        if name in KEPT:
            yield int(match[1], 16), name, _bytes(name, modifiers)


def read_lines(table: bytes) -> list[Row]:
    """The rows of a `.debug_line` section with one table, by address.

    Of a function that was inlined, the line in the function. Opcodes that are not of DWARF 2 are skipped, which its
    format provides for.

    Raises:
        ValueError: it is another version, or more than one table.
    """
    length, version, header_length, unit, _, line_base, line_range, opcode_base = struct.unpack_from("<IHIBBbBB", table)
    if version != 2 or length + 4 != len(table):
        raise ValueError(f"a table of lines of DWARF 2 is read, not version {version}, {length} of {len(table)} bytes")
    operands = table[15 : 15 + opcode_base - 1]  # of each standard opcode, how many
    files = _file_names(table, 15 + opcode_base - 1)

    rows: list[Row] = []
    address, file, line = 0, 1, 1
    place = 10 + header_length
    while place < len(table):
        opcode = table[place]
        place += 1
        if opcode >= opcode_base:
            address += (opcode - opcode_base) // line_range * unit
            line += line_base + (opcode - opcode_base) % line_range
            rows.append(Row(address, files[file - 1], line))
        elif opcode == 0:  # extended: its length, its code
            size, place = _unsigned(table, place)
            if table[place] == 1:  # the end of a sequence
                address, file, line = 0, 1, 1
            elif table[place] == 2:  # the address, relative to the kernel's section
                address = int.from_bytes(table[place + 1 : place + size], "little")
            place += size
        elif opcode == 1:
            rows.append(Row(address, files[file - 1], line))
        elif opcode == 2:
            advance, place = _unsigned(table, place)
            address += advance * unit
        elif opcode == 3:
            advance, place = _signed(table, place)
            line += advance
        elif opcode == 4:
            file, place = _unsigned(table, place)
        elif opcode == 8:
            address += (255 - opcode_base) // line_range * unit
        elif opcode == 9:
            address += int.from_bytes(table[place : place + 2], "little")
            place += 2
        else:
            for _ in range(operands[opcode - 1]):
                _, place = _unsigned(table, place)
    return sorted(rows, key=lambda row: row.address)  # keeps the order of rows at one address: the last one counts


def _file_names(table: bytes, place: int) -> list[str]:
    """Paths by file number - 1; `place` is where the directories begin."""
    folders = [""]
    while table[place]:
        name, place = _string(table, place)
        folders.append(name)
    place += 1
    files = []
    while table[place]:
        name, place = _string(table, place)
        folder, place = _unsigned(table, place)
        _, place = _unsigned(table, place)  # when it was changed
        _, place = _unsigned(table, place)  # its size
        files.append(str(Path(folders[folder]) / name))
    return files


def _string(table: bytes, place: int) -> tuple[str, int]:
    end = table.index(0, place)
    return table[place:end].decode(), end + 1


def _unsigned(table: bytes, place: int) -> tuple[int, int]:
    """A number in LEB128 and the place behind it."""
    value = shift = 0
    while True:
        byte = table[place]
        place += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, place


def _signed(table: bytes, place: int) -> tuple[int, int]:
    """A signed number in LEB128 and the place behind it."""
    value, end = _unsigned(table, place)
    bits = 7 * (end - place)
    return value - (1 << bits) * (value >> (bits - 1)), end


def row_at(rows: list[Row], address: int) -> Row | None:
    """The row that an instruction at `address` belongs to; None where the table does not say."""
    index = bisect_right(rows, address, key=lambda row: row.address)
    return rows[index - 1] if index else None


def sections_of(cubin: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file (System V gABI, chapter 4) that hold bytes, by name."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("a cubin is a 64-bit ELF file, and this is none")
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + size * index) for index in range(count)]
    names = headers[of_names][4]
    without_bytes = 8  # SHT_NOBITS
    return {
        _string(cubin, names + name)[0]: cubin[offset : offset + length]
        for name, kind, _, _, offset, length in headers
        if kind != without_bytes
    }


def _code(sections: dict[str, bytes]) -> bytes:
    """The machine code of the one kernel."""
    codes = [section for name, section in sections.items() if name.startswith(".text.")]
    if len(codes) != 1 or ".debug_line" not in sections:
        raise ValueError(f"a cubin of one kernel with its lines is read, not one with {', '.join(sections)}")
    return codes[0]


def _reads_weight(row: Row | None) -> bool:
    source = linecache.getline(row.file, row.line) if row else ""
    return "load(" in source and "weight" in source


def _bytes(name: str, modifiers: list[str]) -> int:
    if name in ("PREEXIT", "ACQBULK"):
        return 0
    if name in ("UTMALDG", "UBLKCP"):
        return COPY_ENGINE_BYTES
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((widths[modifier] for modifier in reversed(modifiers) if modifier in widths), 4)
