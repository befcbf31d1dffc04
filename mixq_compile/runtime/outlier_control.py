"""What a user says to the outlier states and packed weights of a model: reset, freeze, hold, refresh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.state_access import exclusive_access
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.runtime.weight_store import STORE


def _inner(model: nn.Module) -> nn.Module:
    """The model in a compiled one."""
    return getattr(model, "_orig_mod", model)  # type: ignore[no-any-return]


def _states(model: nn.Module) -> list[OutlierState]:
    inner = _inner(model)
    modules = [module.outlier_state() for module in inner.modules() if isinstance(module, MixqLinear)]
    return [*modules, *STORE.states(inner.parameters())]


@contextmanager
def _alone(states: list[OutlierState]) -> Iterator[None]:
    """A time in which no call reads these states."""
    devices = {state.index.device for state in states}
    with ExitStack() as stack:
        for device in sorted((device for device in devices if device.type == "cuda"), key=str):
            stack.enter_context(exclusive_access(device))
        if any(device.type != "cuda" for device in devices):  # all others are one to it
            stack.enter_context(exclusive_access(torch.device("cpu")))
        yield


def reset(model: nn.Module) -> None:
    """Forgets the outlier columns found online, as after loading; calibrated columns stay."""
    states = _states(model)
    with _alone(states):
        for state in states:
            state.reset()


def freeze(model: nn.Module) -> None:
    """Keeps each outlier column known now and learns no more: results stop depending on traffic."""
    states = _states(model)
    with _alone(states):
        for state in states:
            state.freeze()


@contextmanager
def hold_states(model: nn.Module) -> Iterator[None]:
    """A context in which the model learns no outlier columns: every policy acts as `static`.

    For calls on values that mean nothing: warm-up, profiling, capture of graphs, shape inference. Graphs that
    are first compiled inside are held as well, and learn afterwards. `freeze` and `reset` work inside.

        >>> with mixq_compile.hold_states(fast):
        ...     fast(torch.empty(8, 512, 4096))
    """
    inner = _inner(model)
    parameters = STORE.hold(inner.parameters())
    linears = [each for each in inner.modules() if isinstance(each, MixqLinear) and not each.held]
    # A state that modules share may be held for another of them, which this must not end.
    own = [linear for linear in linears if not linear.outlier_state().held]
    for linear in linears:
        linear.held = True
    known = _states(model)
    with _alone(known):
        held = [state for state in known if state.hold()]
    try:
        yield
    finally:
        STORE.let_go(parameters)
        for linear in linears:
            linear.held = False
        made = [state for state in STORE.states(parameters) if all(state is not each for each in known)]
        now = [linear.outlier_state() for linear in own]  # elsewhere, where the model was moved meanwhile
        with _alone([*held, *made, *now]):
            for state in (*held, *made, *now):
                state.let_go()


@torch.no_grad()
def refresh(model: nn.Module) -> int:
    """Packs again each weight of a compiled model that was written since it was packed; returns how many.

    Writes that torch counts are seen by the next call itself. Those through `.data`, numpy, DLPack or a
    storage are seen after some calls (`report` says how many), or here at once. Waits for the device.
    A model that `quantize` swapped has no 16-bit weights that could be written.
    """
    return sum(STORE.refresh(parameter, look=True) for parameter in _inner(model).parameters())
