"""`hold_states`: values that mean nothing teach nothing, and learning goes on afterwards."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from compiling import block, compiled, rows
from torch import Tensor, nn

import mixq_compile as mixq

ROUTES = ("backend", "quantize")


def prepared(route: str, **options: object) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = block()
    if route == "backend":
        return model, compiled(model, **options)
    swapped = mixq.quantize(model, **options)
    return swapped, swapped


def columns(model: nn.Module) -> list[tuple[int, ...]]:
    return [linear.outlier_columns for linear in mixq.report(model).quantized]


@pytest.mark.parametrize("miss", ["exact", "lazy", "frozen", "per_call"])
@pytest.mark.parametrize("route", ROUTES)
def test_made_up_values_teach_nothing(route: str, miss: str) -> None:
    model, call = prepared(route, miss=miss)
    call(rows(columns=(3,)))
    known = columns(model)
    with mixq.hold_states(model):
        call(rows(columns=(7, 9, 11), size=3e8))
    assert columns(model) == known
    call(rows(columns=(5,)))
    assert columns(model)[0] == ((5,) if miss == "per_call" else (3, 5)), "learning did not go on"


def test_graphs_first_compiled_inside_are_held_and_learn_afterwards() -> None:
    model, call = prepared("backend")
    with mixq.hold_states(call):
        call(rows(columns=(7,)))
        assert columns(model) == [(), ()]
    call(rows(columns=(3,)))
    assert columns(model)[0] == (3,)


@pytest.mark.parametrize("route", ROUTES)
def test_results_inside_are_those_of_the_known_columns(route: str) -> None:
    model, call = prepared(route)
    x = rows(columns=(3,))
    learned = call(x)
    with mixq.hold_states(model):
        assert torch.equal(call(x), learned)


@pytest.mark.parametrize("route", ROUTES)
def test_an_error_inside_ends_the_hold(route: str) -> None:
    model, call = prepared(route)
    call(rows())
    with pytest.raises(ZeroDivisionError), mixq.hold_states(model):
        raise ZeroDivisionError
    call(rows(columns=(3,)))
    assert columns(model)[0] == (3,)


@pytest.mark.parametrize("route", ROUTES)
def test_holds_within_holds(route: str) -> None:
    model, call = prepared(route)
    call(rows())
    with mixq.hold_states(model):
        with mixq.hold_states(model):
            call(rows(columns=(7,)))
        call(rows(columns=(9,)))
    assert columns(model)[0] == ()
    call(rows(columns=(3,)))
    assert columns(model)[0] == (3,)


@pytest.mark.parametrize("route", ROUTES)
def test_reset_and_freeze_inside(route: str) -> None:
    model, call = prepared(route)
    call(rows(columns=(3,)))
    with mixq.hold_states(model):
        mixq.reset(model)
        call(rows(columns=(7,)))
        assert columns(model)[0] == (), "reset ended the hold"
    call(rows(columns=(5,)))
    assert columns(model)[0] == (5,)
    with mixq.hold_states(model):
        mixq.freeze(model)
    call(rows(columns=(9,)))
    assert columns(model)[0] == (5,), "the end of the hold undid freeze"


def test_a_frozen_model_stays_frozen() -> None:
    model, call = prepared("quantize")
    call(rows(columns=(3,)))
    mixq.freeze(model)
    with mixq.hold_states(model):
        call(rows())
    call(rows(columns=(9,)))
    assert columns(model)[0] == (3,)


def test_what_is_copied_or_saved_inside_is_not_held_for_ever() -> None:
    model, call = prepared("quantize")
    call(rows())
    with mixq.hold_states(model):
        state = copy.deepcopy(model.state_dict())
    other = mixq.quantize(block())
    other.load_state_dict(state)
    other(rows(columns=(3,)))
    assert columns(other)[0] == (3,)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_and_loaded])
def test_a_copy_made_inside_learns_and_the_original_stays_held(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model, call = prepared("quantize")
    call(rows(columns=(3,)))
    with mixq.hold_states(model):
        other = copied(model)
        other(rows(columns=(5,)))
        call(rows(columns=(7,)))
        assert (columns(other)[0], columns(model)[0]) == ((3, 5), (3,))
    other(rows(columns=(9,)))
    call(rows(columns=(7,)))
    assert (columns(other)[0], columns(model)[0]) == ((3, 5, 9), (3, 7))


def test_a_shallow_copy_made_inside_ends_no_hold() -> None:
    model, call = prepared("quantize")
    with mixq.hold_states(model):
        other = copy.copy(model.get_submodule("up_proj"))
        call(rows(columns=(7,)))
        assert columns(model)[0] == ()
    other(rows(columns=(7,)))
    assert columns(model)[0] == (7,), "its buffers are the original's"


def test_a_model_moved_inside_learns_afterwards() -> None:
    model, call = prepared("quantize")
    with mixq.hold_states(model):
        model.up_proj.to_empty(device="meta")
        model.up_proj.to_empty(device="cpu").load_state_dict(prepared("quantize")[0].up_proj.state_dict())
        call(rows(columns=(7,)))
        assert columns(model)[0] == ()
    call(rows(columns=(7,)))
    assert columns(model)[0] == (7,)


def test_loading_inside_keeps_the_hold() -> None:
    model, call = prepared("quantize")
    call(rows(columns=(3,)))
    state = copy.deepcopy(model.state_dict())
    with mixq.hold_states(model):
        model.load_state_dict(state)
        call(rows(columns=(7,)))
        assert columns(model)[0] == (3,)
    call(rows(columns=(7,)))
    assert columns(model)[0] == (3, 7)


def test_a_model_that_is_partly_on_the_meta_device() -> None:
    model = mixq.quantize(block())
    model.down_proj.to("meta")
    mixq.freeze(model)
    mixq.reset(model)


def test_a_hold_of_the_whole_model_inside_that_of_a_part_does_not_end_it() -> None:
    """Linears that read one value share one state: ending the inner hold of one must not end the other's."""

    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.q_proj(x) + self.k_proj(x)
            return result

    model = mixq.quantize(Siblings().eval().requires_grad_(False))
    fast = compiled(model)
    fast(rows())
    assert model.q_proj.counters.data_ptr() == model.k_proj.counters.data_ptr()
    with mixq.hold_states(model.q_proj):
        with mixq.hold_states(model):
            fast(rows(columns=(7,)))
        fast(rows(columns=(7,)))
        assert columns(model)[0] == ()
    fast(rows(columns=(7,)))
    assert columns(model)[0] == (7,)
