"""Accumulators of linears: one for all that read the same tensors, such as q, k and v."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixq_compile.calibration.accumulator import InputAccumulator


@dataclass(eq=False)
class _Group:
    """Linears that have read the same rows so far."""

    accumulator: InputAccumulator
    members: set[nn.Module]
    is_new: bool = True


@dataclass(eq=False)
class _Latest:
    """The input of the last call, which its group has not taken in yet."""

    activation: Tensor
    rows: Tensor
    group: _Group
    readers: set[nn.Module]

    def is_same(self, activation: Tensor, rows: Tensor) -> bool:
        # The bits too: between two calls the model may have written into the tensor. Bytes, since a
        # NaN does not equal itself.
        return activation is self.activation and torch.equal(
            rows.contiguous().view(torch.uint8), self.rows.view(torch.uint8)
        )


class SharedInputs:
    """Hands each linear's input to an accumulator, and each input that several share to one.

    Linears share where each of their calls got the tensor of the call before it. One that parts with
    the others goes on with a copy of what they had in common, so sharing changes no result.
    """

    def __init__(self, make: Callable[[int, torch.device], InputAccumulator]) -> None:
        self._make = make
        self._groups: dict[nn.Module, _Group] = {}
        self._latest: _Latest | None = None

    def add(self, linear: nn.Module, activation: Tensor, rows: Tensor) -> None:
        """Takes in one input: the tensor that the linear got, and its rows `[M, K]`, M above 0."""
        with _plain_arithmetic(rows.device):
            self._add(linear, activation, rows)

    def _add(self, linear: nn.Module, activation: Tensor, rows: Tensor) -> None:
        latest = self._latest
        if latest is not None and linear not in latest.readers and latest.is_same(activation, rows):
            group = self._groups.get(linear)
            if group is latest.group or (group is None and latest.group.is_new):
                self._groups[linear] = latest.group
                latest.group.members.add(linear)
                latest.readers.add(linear)
                return
        self._settle()
        if linear not in self._groups:
            accumulator = self._make(rows.shape[1], rows.device)
            self._groups[linear] = _Group(accumulator, {linear})
        # Its own memory, because the model may write into the tensor before it is taken in.
        own = rows.clone(memory_format=torch.contiguous_format)
        self._latest = _Latest(activation, own, self._groups[linear], {linear})

    def settle(self) -> None:
        """Takes in the input that waits for further readers; to be called after each batch."""
        if self._latest is not None:
            with _plain_arithmetic(self._latest.rows.device):
                self._settle()

    def _settle(self) -> None:
        latest, self._latest = self._latest, None
        if latest is None:
            return
        group = latest.group
        others = group.members - latest.readers
        if others:
            parted = _Group(copy.deepcopy(group.accumulator), others, is_new=False)
            self._groups.update(dict.fromkeys(others, parted))
            group.members = latest.readers
        group.accumulator.add(latest.rows)
        group.is_new = False

    def take_out(self) -> list[tuple[InputAccumulator, frozenset[nn.Module]]]:
        """The accumulators, each with its linears; they are no longer held here."""
        self.settle()
        groups = list({id(group): group for group in self._groups.values()}.values())
        self._groups.clear()
        return [(group.accumulator, frozenset(group.members)) for group in groups]


@contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Arithmetic as it is outside the model, whose autocast would round the sums to 16 bit."""
    with ExitStack() as stack:
        # A tensor made in inference mode could not be added to outside it.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield
