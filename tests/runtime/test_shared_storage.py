"""`release_weights` frees a weight's memory where that is this weight's alone, and else says why it stays."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiling import Block, block, compiled, rows
from rewriting import sqnr
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.errors import ReleasedWeightError
from mixq_compile.runtime import release as releasing
from mixq_compile.runtime.weight_store import STORE

Keeper = Callable[[Block, Path], Any]


def _flat(model: Block, _: Path) -> None:
    """As FSDP and flat checkpoints lay parameters: views of one vector."""
    weights = [model.up_proj.weight, model.down_proj.weight]
    flat, start = torch.cat([weight.flatten() for weight in weights]), 0
    for weight in weights:
        weight.data = flat[start : start + weight.numel()].view_as(weight)
        start += weight.numel()


def _mapped(model: Block, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "state.pt")
    model.load_state_dict(torch.load(folder / "state.pt", mmap=True), assign=True)


def _safetensors(model: Block, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(model.state_dict(), folder / "state.safetensors")
    model.load_state_dict(load_file(folder / "state.safetensors"), assign=True)


def _of_numpy(model: Block, _: Path) -> Any:
    array = model.up_proj.weight.numpy().copy()
    model.up_proj.weight = nn.Parameter(torch.from_numpy(array), requires_grad=False)
    return array


def _tied(model: Block, _: Path) -> Any:
    other = nn.Linear(64, 128, bias=False)
    other.weight = model.up_proj.weight
    return other


def _buffer(model: Block, _: Path) -> None:
    model.register_buffer("view", model.up_proj.weight.data[3:])


def _plain(model: Block, _: Path) -> None:
    model.plain = model.up_proj.weight.detach()


def _list(model: Block, _: Path) -> None:
    model.several = [model.up_proj.weight.data.t()]


def _of_a_buffer(model: Block, _: Path) -> None:
    model.register_buffer("whole", model.up_proj.weight.data.clone())
    model.up_proj.weight = nn.Parameter(model.whole, requires_grad=False)


def _larger(model: Block, _: Path) -> None:
    model.up_proj.weight.data = torch.cat([model.up_proj.weight, torch.ones(9, 64)])[:128]


def _other_parameter(model: Block, _: Path) -> Any:
    return nn.Parameter(model.up_proj.weight.data, requires_grad=False)


SHARED = "another tensor, array or handle uses its memory"
FILE = "its memory belongs to a mapped file or to an array"
PART = "it is a part of a memory of"
BOTH = ("up_proj", "down_proj")
SHARING: dict[str, tuple[Keeper, str, tuple[str, ...]]] = {
    "views of a flat vector": (_flat, PART, BOTH),
    "a file of torch.save, mapped": (_mapped, FILE, BOTH),
    "a safetensors file, mapped": (_safetensors, FILE, BOTH),
    "numpy's view of it": (lambda model, _: model.up_proj.weight.numpy(), FILE, BOTH[:1]),
    "an array of numpy": (_of_numpy, FILE, BOTH[:1]),
    "a DLPack consumer": (lambda model, _: np.from_dlpack(model.up_proj.weight), SHARED, BOTH[:1]),
    "the user's view": (lambda model, _: model.up_proj.weight.data, SHARED, BOTH[:1]),
    "a row of it": (lambda model, _: model.up_proj.weight.detach()[0], SHARED, BOTH[:1]),
    "a buffer that is a view of it": (_buffer, SHARED, BOTH[:1]),
    "a plain attribute of the model": (_plain, SHARED, BOTH[:1]),
    "a list in the model": (_list, SHARED, BOTH[:1]),
    "a view of a buffer": (_of_a_buffer, SHARED, BOTH[:1]),
    "another parameter": (_other_parameter, SHARED, BOTH[:1]),
    "a held storage": (lambda model, _: model.up_proj.weight.untyped_storage(), SHARED, BOTH[:1]),
    "a part of a larger memory": (_larger, PART, BOTH[:1]),
    "shared between processes": (lambda model, _: model.share_memory(), "shared between processes", BOTH),
    "another module's weight": (_tied, "2 modules hold it", BOTH[:1]),
}


@pytest.mark.parametrize("case", SHARING)
def test_memory_that_something_else_uses_stays(case: str, tmp_path: Path) -> None:
    share, reason, names = SHARING[case]
    model, reference = block(), block()
    held = share(model, tmp_path)
    before = {name: getattr(model, name).weight.clone() for name in names}
    x = rows(columns=(3,))
    fast = compiled(model, release_weights=True)
    with pytest.warns(UserWarning, match=rf"kept the 16-bit weights of {len(names)} of 2 .*{reason}") as said:
        result = fast(x)
    assert all(name in str(said[0].message) for name in names)
    assert sqnr(reference(x), result) > 30
    for name in names:
        weight = getattr(model, name).weight
        assert not STORE.is_released(weight), f"{name} is marked as freed and was kept"
        assert torch.equal(weight, before[name]), f"{name} changed"
    if isinstance(held, (Tensor, np.ndarray)):
        assert np.isfinite(np.asarray(held)).all()
    rest = {"up_proj", "down_proj"} - set(names)
    assert all(STORE.is_released(getattr(model, name).weight) for name in rest)
    report = mixq.report(fast)
    assert {linear.fqn for linear in report.quantized if linear.float_weight_kept} == set(names)
    assert {linear.fqn for linear in report.quantized if linear.kept_because} == set(names)
    assert f"{names[0]}: release_weights kept its 16-bit weight: {report.quantized[0].kept_because}" in str(
        report
    )
    if not rest:
        assert sqnr(reference(x), model(x)) > 100, "a model that was kept whole runs uncompiled"


def test_it_is_said_once_and_not_by_each_recompilation() -> None:
    model = block()
    held = model.up_proj.weight.data
    fast = compiled(model, release_weights=True, dynamic=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for count in (6, 9, 30):
            fast(rows(count))
    assert mixq.report(fast).graphs >= 3
    assert len([entry for entry in said if "release_weights kept" in str(entry.message)]) == 1
    assert held.isfinite().all()


def test_a_later_compilation_frees_what_nobody_uses_any_more() -> None:
    model = block()
    held = model.up_proj.weight.data
    with pytest.warns(UserWarning, match="release_weights kept"):
        compiled(model, release_weights=True)(rows())
    del held
    fast = compiled(model, release_weights=True, batch_invariant=True)
    fast(rows())
    assert STORE.is_released(model.up_proj.weight)
    assert mixq.report(fast).quantized[0].kept_because is None


def test_a_gradient_and_an_optimizer_hold_other_memory() -> None:
    model = block().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(rows()).sum().backward()
    optimizer.step()
    gradient = model.up_proj.weight.grad.clone()
    with torch.no_grad():
        compiled(model, release_weights=True)(rows())
    assert STORE.is_released(model.up_proj.weight)
    assert torch.equal(model.up_proj.weight.grad, gradient)


def test_a_weight_that_torch_refuses_to_free_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two fails: the first is freed and guarded, the second is as it was."""
    model, reference = block(), block()
    give_up = STORE.release

    def refuse(weight: nn.Parameter) -> None:
        if weight is model.down_proj.weight:
            raise RuntimeError("no\nsuch thing")
        give_up(weight)

    monkeypatch.setattr(releasing.STORE, "release", refuse)
    fast = compiled(model, release_weights=True)
    with pytest.warns(UserWarning, match=r"torch does not free it \(no\) \(down_proj\)"):
        fast(rows())
    assert STORE.is_released(model.up_proj.weight)
    with pytest.raises(ReleasedWeightError):
        model.up_proj(rows())
    assert torch.equal(model.down_proj.weight, reference.down_proj.weight)
    model.down_proj.state_dict()
    assert sqnr(reference(rows()), fast(rows())) > 30


READING: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda weight: weight.sum(),
    "operator": lambda weight: weight + 1,
    "linear": lambda weight: nn.functional.linear(rows(), weight),
    "write": lambda weight: weight.copy_(torch.zeros(128, 64)),
    "data": lambda weight: weight.data.sum(),
    "a view": lambda weight: weight.detach()[2:],
    "numpy": lambda weight: weight.numpy(),
    "array": lambda weight: np.asarray(weight),
    "dlpack": lambda weight: np.from_dlpack(weight),
    "list": lambda weight: weight.tolist(),
    "clone": lambda weight: weight.clone(),
    "copy": copy.deepcopy,
    "save": lambda weight: torch.save(weight, io.BytesIO()),
    "cast": lambda weight: weight.bfloat16(),
}


@pytest.mark.parametrize("how", READING)
def test_reading_a_freed_weight_itself_names_the_option(how: str) -> None:
    model = block()
    compiled(model, release_weights=True)(rows())
    weight = model.up_proj.weight
    with pytest.raises(ReleasedWeightError, match="release_weights"):
        READING[how](weight)
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == ((128, 64), torch.float32, "cpu")
    assert "ReleasedParameter(shape=(128, 64)" in repr(weight)
    assert isinstance(weight, nn.Parameter)


def test_a_freed_weight_that_is_given_data_again_counts_again() -> None:
    model, reference = block(), block()
    fast = compiled(model, release_weights=True)
    fast(rows())
    for name in ("up_proj", "down_proj"):
        for changed in (getattr(model, name), getattr(reference, name)):
            changed.weight.data = torch.full(changed.weight.shape, 0.25)
    assert sqnr(reference(rows()), model(rows())) > 100, "the module refuses to run with the new weight"
    assert sqnr(reference(rows()), fast(rows())) > 30, "the compiled model goes on with the old codes"


def test_a_module_that_is_given_another_weight_works_again() -> None:
    model = block()
    compiled(model, release_weights=True)(rows())
    for module in (model.up_proj, model.down_proj):
        module.weight = nn.Parameter(torch.ones(module.weight.shape), requires_grad=False)
    assert torch.equal(copy.deepcopy(model)(rows()), model(rows()))
    assert model.half().state_dict()["up_proj.weight"].dtype == torch.float16


class TestExport:
    def test_an_export_frees_nothing_of_the_users_model(self) -> None:
        model, reference = block(), block()
        program = mixq.capture(model, rows())
        quantized, _ = mixq.compile(program, force=True, kernel="ref")
        assert sqnr(reference(rows()), quantized.module()(rows())) > 30
        for (name, found), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert torch.equal(found, expected), f"{name} changed"
            assert not STORE.is_released(found)
        assert torch.equal(model(rows()), reference(rows()))
        assert torch.equal(program.module()(rows()), reference(rows()))

    def test_a_released_model_cannot_be_captured(self) -> None:
        model = block()
        compiled(model, release_weights=True)(rows())
        with pytest.raises(ReleasedWeightError, match="release_weights"):
            mixq.capture(model, rows())
