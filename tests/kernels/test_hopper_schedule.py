"""The Hopper kernel's schedule, run as Python: every step is done once, and no owner waits for sums."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mixq_compile.kernels.tl import hopper_schedule
from mixq_compile.kernels.tl.hopper_schedule import STEPS_OF_A_HANDOVER, shared_steps
from mixq_compile.kernels.tl.toolkit import ceil_div

PROGRAMS = 132
CASES = {
    "2.6 waves": (344, 32),
    "5.2 waves": (688, 32),
    "2.4 waves": (320, 64),
    "9.7 waves": (1280, 64),
    "one tile too many": (133, 32),
    "6.8 waves": (896, 64),
    "whole waves": (264, 64),
    "less than a wave": (100, 64),
    "almost full": (263, 64),
}


def python(function: object) -> object:
    """The Python function that a Gluon function was made of."""
    return getattr(function, "fn", function)


def pieces_of(program: int, tiles: int, steps: int, given: int, monkeypatch: pytest.MonkeyPatch) -> list:
    fake = SimpleNamespace(
        program_id=lambda axis: program,
        num_programs=lambda axis: min(tiles, PROGRAMS),
        cdiv=ceil_div,
        where=lambda condition, left, right: left if condition else right,
    )
    monkeypatch.setattr(hopper_schedule, "gl", fake)
    number_of_program = python(hopper_schedule._number_of_program)
    monkeypatch.setattr(hopper_schedule, "_number_of_program", number_of_program)
    count = python(hopper_schedule.count_pieces)(tiles, given > 0)
    piece = python(hopper_schedule.piece)
    return [piece(number, tiles, steps, given, given > 0) for number in range(count)]


@pytest.mark.parametrize(("tiles", "steps"), CASES.values(), ids=CASES)
def test_every_step_of_every_tile_is_done_once(
    tiles: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = shared_steps(tiles, steps, PROGRAMS)
    done = [
        (tile, step)
        for program in range(min(tiles, PROGRAMS))
        for tile, first, last in pieces_of(program, tiles, steps, given, monkeypatch)
        for step in range(first, last)
    ]
    assert len(done) == len(set(done)) == tiles * steps


@pytest.mark.parametrize(("tiles", "steps"), CASES.values(), ids=CASES)
def test_sums_are_there_before_their_owner_needs_them(
    tiles: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = shared_steps(tiles, steps, PROGRAMS)
    left, needed = {}, {}
    for program in range(min(tiles, PROGRAMS)):
        time = 0
        for tile, first, last in pieces_of(program, tiles, steps, given, monkeypatch):
            time += last - first
            if first > 0:
                time += STEPS_OF_A_HANDOVER
                left[tile] = time
            elif last < steps:
                needed[tile] = time
    assert left.keys() == needed.keys()
    assert all(left[tile] <= needed[tile] for tile in needed)


@pytest.mark.parametrize(("tiles", "steps"), CASES.values(), ids=CASES)
def test_helpers_start_before_the_owners_that_wait_for_them(
    tiles: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else owners could hold every multiprocessor while their helpers wait for one."""
    given = shared_steps(tiles, steps, PROGRAMS)
    helpers, owners, flags = {}, {}, set()
    for program in range(min(tiles, PROGRAMS)):
        for tile, first, last in pieces_of(program, tiles, steps, given, monkeypatch):
            if first > 0:
                helpers[tile] = program
            elif last < steps:
                owners[tile] = program
                flags.add(tile % PROGRAMS)
    assert helpers.keys() == owners.keys()
    assert len(flags) == len(owners), "two shared tiles have one flag"
    if owners:
        assert max(helpers.values()) < min(owners.values())


@pytest.mark.parametrize(("tiles", "steps"), CASES.values(), ids=CASES)
def test_sharing_shortens_the_longest_program(
    tiles: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = shared_steps(tiles, steps, PROGRAMS)
    if not given:
        pytest.skip("not shared")
    longest = max(
        sum(
            last - first + STEPS_OF_A_HANDOVER * (first > 0)
            for _, first, last in pieces_of(program, tiles, steps, given, monkeypatch)
        )
        for program in range(PROGRAMS)
    )
    assert longest <= ceil_div(tiles, PROGRAMS) * steps - given


def test_which_calls_share() -> None:
    shares = {name for name, (tiles, steps) in CASES.items() if shared_steps(tiles, steps, PROGRAMS)}
    assert shares == {"2.6 waves", "5.2 waves", "2.4 waves", "9.7 waves", "one tile too many", "6.8 waves"}
