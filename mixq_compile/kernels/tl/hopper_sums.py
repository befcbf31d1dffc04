# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""How the sums of a shared tile go from its helper to its owner, through memory: see `hopper_schedule`."""

from __future__ import annotations

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
except ImportError:
    from mixq_compile.kernels.tl import toolkit

    gluon, gl = toolkit.triton, toolkit.tl


@gluon.jit
def _by_thread(sums, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """A matrix of accumulators as `[threads, values of a thread]`: its layout says so, nothing moves."""
    split = gl.reshape(sums, [BLOCK_M // 16, 2, 8, BLOCK_N // 8, 4, 2])
    return gl.reshape(gl.permute(split, [0, 2, 4, 3, 1, 5]), [BLOCK_M * 2, BLOCK_N // 2])


@gluon.jit
def _of_matrix(sums, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The inverse of `_by_thread`."""
    split = gl.reshape(sums, [BLOCK_M // 16, 8, 4, BLOCK_N // 8, 2, 2])
    return gl.reshape(gl.permute(split, [0, 4, 1, 3, 2, 5]), [BLOCK_M, BLOCK_N])


@gluon.jit
def _places(partial_sums, owner, layout: gl.constexpr, THREADS: gl.constexpr, VALUES: gl.constexpr):
    """Four values of a thread beside the next thread's four, so that a warp's accesses are contiguous."""
    thread = gl.arange(0, THREADS, gl.SliceLayout(1, layout))
    value = gl.arange(0, VALUES, gl.SliceLayout(0, layout))
    place = (value // 4) * (4 * THREADS) + value % 4
    return (
        partial_sums + owner * (THREADS * VALUES) + gl.expand_dims(thread * 4, 1) + gl.expand_dims(place, 0)
    )


@gluon.jit
def add_left_sums(partial_sums, handovers, owner, accumulator, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Waits for what a helper leaves, adds it, and takes the flag down for the next launch."""
    while gl.atomic_add(handovers + owner, 0, sem="acquire") == 0:
        pass
    gl.thread_barrier()
    values = _by_thread(accumulator, BLOCK_M, BLOCK_N)
    layout: gl.constexpr = values.type.layout
    places = _places(partial_sums, owner, layout, BLOCK_M * 2, BLOCK_N // 2)
    values += gl.load(places, cache_modifier=".cg")
    gl.store(handovers + owner, 0)
    return gl.convert_layout(_of_matrix(values, BLOCK_M, BLOCK_N), accumulator.type.layout)


@gluon.jit
def leave_sums(partial_sums, handovers, owner, accumulator, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Writes a helper's sums, and then raises the owner's flag."""
    values = _by_thread(accumulator, BLOCK_M, BLOCK_N)
    layout: gl.constexpr = values.type.layout
    gl.store(_places(partial_sums, owner, layout, BLOCK_M * 2, BLOCK_N // 2), values)
    # All threads must have stored before the flag of one publishes that.
    gl.thread_barrier()
    gl.atomic_xchg(handovers + owner, 1, sem="release")
