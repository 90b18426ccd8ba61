"""What is read of machine code: instructions, and the source lines they come from."""

from __future__ import annotations

import pytest

from aloud.benchmarks.machine_code import read_lines, read_listing, sections_of

LISTING = """
	.headerflags	@"EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
        /*0070*/                   PREEXIT ;
        /*0080*/                   LDG.E.128 R4, desc[UR6][R4.64] ;
        /*0090*/              @!P0 LDG.E.EF.64.CONSTANT R4, [R4.64] ;
        /*00a0*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], [R4.64] ;
        /*00b0*/                   ACQBULK                      &wr=0x2          ?trans1;
        /*00c0*/                   LDG.E R4, [R4.64] ;
        /*00d0*/                   LDG.E.U16 R4, [R4.64] ;
        /*00e0*/                   FADD R1, R2, R3 ;
        /*00f0*/                   STG.E.64 [R2.64], R4 ;
        /*0100*/                   UBLKCP.S.G [UR4], [UR6], UR8 ;
        /*12ab0*/                  STL [R1], R4 ;
"""


def test_reads_a_listing():
    assert list(read_listing(LISTING)) == [
        (0x70, "PREEXIT", 0),
        (0x80, "LDG", 16),
        (0x90, "LDG", 8),
        (0xA0, "LDGSTS", 16),
        (0xB0, "ACQBULK", 0),
        (0xC0, "LDG", 4),
        (0xD0, "LDG", 2),
        (0xF0, "STG", 8),
        (0x100, "UBLKCP", 16),
        (0x12AB0, "STL", 4),
    ]


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_several_kernels_together_are_read_as_the_disassembler_reads_each(printed, capability):
    instructions, differ = printed("ask_nvdisasm.py", str(capability))
    assert instructions > 1000
    assert differ == []


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="64-bit ELF"):
        sections_of(b"\x7fELF\x01" + bytes(100))
    with pytest.raises(ValueError, match="DWARF 2 is read, not version 5"):
        read_lines(b"\x1c\0\0\0\x05\0" + bytes(26))
