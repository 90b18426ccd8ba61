"""A machine for compiled kernels: runs the PTX that Triton makes, on the CPU, and watches its memory.

Triton's interpreter runs a kernel's Python; this runs what the compiler made of it, all programs of a launch side by
side, one instruction at a time. It refuses what a GPU would leave undefined: reads and writes outside of tensors'
allocations, misaligned ones, registers and shared memory that nothing was written to, threads of a warp apart where
they must be together, two threads at one place with nothing between them that says who is first, and writes before a
programmatic launch's wait. What such launches read before it, and others write, `launches.Chain` knows.

    program.py       the text, taken apart
    arithmetic.py    instructions between registers
    instructions.py  loads, stores, copies, waits
    warp.py          instructions of a warp: shuffles, matrices
    warp_group.py    products of four warps
    memory.py        shared and global memory
    order.py         which access comes before which
    machine.py       threads, branches, barriers
    launches.py      from a `Launch` to the machine

Approximate instructions (ex2, rsqrt, div.full) are as exact here as float32 is; a fused multiplication and addition may
be rounded twice. Not seen: integer divisions by zero, fences that are missing before products of warp groups (wgmma),
a copy's source that is written before the copy was waited for, registers that some threads have written and others
read. What a kernel costs, and how a chip schedules it, is nobody's here.
"""
