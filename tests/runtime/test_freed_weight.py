"""`MixqLinear.weight`: the metadata of the freed weight, and an error that names the linear for all else."""

from __future__ import annotations

import copy
import io
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.errors import ReleasedWeightError
from mixq_compile.runtime.freed_weight import FreedWeight

ROWS, COLUMNS = 48, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(COLUMNS, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return mixq.quantize(nn.Sequential(Block().to(dtype).requires_grad_(False)))


def weight(dtype: torch.dtype = torch.float32) -> Any:
    return model(dtype)[0].proj.weight


QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "shape": lambda w: w.shape,
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "layout": lambda w: w.layout,
    "ndim": lambda w: w.ndim,
    "size()": lambda w: w.size(),
    "size(-1)": lambda w: w.size(-1),
    "size(dim=0)": lambda w: w.size(dim=0),
    "dim()": lambda w: w.dim(),
    "numel()": lambda w: w.numel(),
    "element_size()": lambda w: w.element_size(),
    "itemsize": lambda w: w.itemsize,
    "nbytes": lambda w: w.nbytes,
    "len": len,
    "stride()": lambda w: w.stride(),
    "is_contiguous()": lambda w: w.is_contiguous(),
    "requires_grad": lambda w: w.requires_grad,
    "grad": lambda w: w.grad,
    "grad_fn": lambda w: w.grad_fn,
    "is_leaf": lambda w: w.is_leaf,
    "is_cuda": lambda w: w.is_cuda,
    "is_cpu": lambda w: w.is_cpu,
    "is_meta": lambda w: w.is_meta,
    "is_sparse": lambda w: w.is_sparse,
    "is_quantized": lambda w: w.is_quantized,
    "is_nested": lambda w: w.is_nested,
    "is_floating_point()": lambda w: w.is_floating_point(),
    "is_complex()": lambda w: w.is_complex(),
    "get_device()": lambda w: w.get_device(),
    "torch.is_floating_point": torch.is_floating_point,
    "torch.numel": torch.numel,
    "isinstance": lambda w: isinstance(w, Tensor),
    "is_tensor": torch.is_tensor,
    "x.to(w)": lambda w: torch.ones(2, dtype=torch.float64).to(w).dtype,
    "x.type_as(w)": lambda w: torch.ones(2, dtype=torch.float64).type_as(w).dtype,
    "new_zeros": lambda w: w.new_zeros(2).dtype,
    "unknown attribute by getattr": lambda w: getattr(w, "quant_state", None),
    "unknown attribute by hasattr": lambda w: hasattr(w, "ds_numel"),
    "data.dtype": lambda w: w.data.dtype,
    "detach().shape": lambda w: w.detach().shape,
    "freezing": lambda w: w.requires_grad_(False).requires_grad,
}


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_questions_are_answered_as_the_weight_would(name: str, dtype: torch.dtype) -> None:
    before = nn.Linear(COLUMNS, ROWS, dtype=dtype).requires_grad_(False).weight
    assert QUESTIONS[name](weight(dtype)) == QUESTIONS[name](before)


X = torch.ones(2, COLUMNS)
COMPUTATIONS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda w: nn.functional.linear(X, w),
    "matmul": lambda w: X @ w.T,
    "right operand": lambda w: 2 * w,
    "operator": lambda w: torch.ops.aten.mul(w, 2),
    "inside a list": lambda w: torch.stack([w, w]),
    "out of a keyword": lambda w: torch.add(input=torch.ones(1), other=w),
    "copied from": lambda w: torch.empty(ROWS, COLUMNS).copy_(w),
    "index": lambda w: w[0],
    "iteration": list,
    "data": lambda w: w.data + 1,
    "transpose": lambda w: w.T,
    "detach": lambda w: w.detach().cpu(),
    "clone": lambda w: w.clone(),
    "cast": lambda w: w.to(torch.float16),
    "float": float,
    "bool": bool,
    "comparison": lambda w: bool((w == w).all()),
    "sum": lambda w: w.sum(),
    "item": lambda w: w.item(),
    "numpy": lambda w: w.numpy(),
    "tolist": lambda w: w.tolist(),
    "data_ptr": lambda w: w.data_ptr(),
    "storage": lambda w: w.untyped_storage(),
    "zeros_like": torch.zeros_like,
    "Parameter": nn.Parameter,
    "in place": lambda w: w.mul_(2),
    "set data": lambda w: setattr(w, "data", torch.ones(1)),
    "gradients": lambda w: w.requires_grad_(),
    "set item": lambda w: operator.setitem(w, 0, 1.0),
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_computing_with_it_names_the_linear_and_the_remedy(name: str) -> None:
    with pytest.raises(ReleasedWeightError, match=r"linear '0\.proj' .* ignore=\['lm_head', '0\.proj'\]"):
        COMPUTATIONS[name](weight())


def test_without_torch_function_it_is_an_error_too() -> None:
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(ReleasedWeightError, match=r"'0\.proj'"):
        weight() + 1


def test_it_holds_no_memory_and_keeps_none_alive() -> None:
    swapped = model()[0].proj
    assert not [value for value in vars(swapped).values() if type(value) is Tensor]
    whole = [name for name, each in swapped.named_parameters() if each.shape == (ROWS, COLUMNS)]
    assert whole == ["weight_codes"]


ASSIGNMENTS: dict[str, Callable[[nn.Module], Any]] = {
    "a parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.ones(ROWS, COLUMNS))),
    "a tensor": lambda m: setattr(m, "weight", torch.ones(ROWS, COLUMNS)),
    "None": lambda m: setattr(m, "weight", None),
    "register_parameter": lambda m: m.register_parameter("weight", nn.Parameter(torch.ones(1))),
    "its data": lambda m: setattr(m.weight, "data", torch.ones(ROWS, COLUMNS)),
    "functional_call": lambda m: torch.func.functional_call(m, {"weight": torch.ones(ROWS, COLUMNS)}, (X,)),
}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_assigning_is_an_error(name: str) -> None:
    swapped = model()[0].proj
    with pytest.raises(ReleasedWeightError, match=r"'0\.proj'"):
        ASSIGNMENTS[name](swapped)


MOVES: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype, str]] = {
    "deepcopy": (copy.deepcopy, torch.float32, "cpu"),
    "copy": (copy.copy, torch.float32, "cpu"),
    "pickle": (lambda m: pickle.loads(pickle.dumps(m)), torch.float32, "cpu"),
    "half": (lambda m: m.half(), torch.float16, "cpu"),
    "to a dtype": (lambda m: m.to(torch.bfloat16), torch.bfloat16, "cpu"),
    "to a device": (lambda m: m.to("meta"), torch.float32, "meta"),
    "to_empty": (lambda m: m.to("meta").to_empty(device="cpu"), torch.float32, "cpu"),
}


@pytest.mark.parametrize("name", MOVES)
def test_it_follows_its_module_and_keeps_the_name(name: str) -> None:
    move, dtype, device = MOVES[name]
    found = move(model())[0].proj.weight
    assert type(found) is FreedWeight
    assert (found.dtype, found.device.type, tuple(found.shape)) == (dtype, device, (ROWS, COLUMNS))
    with pytest.raises(ReleasedWeightError, match=r"'0\.proj'"):
        found + 1


def test_a_saved_model_is_read_again() -> None:
    saved, original = io.BytesIO(), model()
    torch.save(original, saved)
    saved.seek(0)
    read = torch.load(saved, weights_only=False)
    assert torch.equal(read(X), original(X))
    assert read[0].proj.fqn == "0.proj"


def test_printing_says_what_it_is() -> None:
    text = "FreedWeight((48, 64), dtype=torch.float32, device='cpu', of='0.proj')"
    assert repr(weight()) == str(weight()) == f"{weight()}" == text


class Cautious(nn.Module):
    """Asks a weight's metadata before it calls the linear, as T5's feed-forward does."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wo = nn.Linear(COLUMNS, COLUMNS)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        weight = self.wo.weight
        if isinstance(weight, Tensor) and x.dtype != weight.dtype and weight.device == x.device:
            x = x.to(weight.dtype)
        assert getattr(weight, "quant_state", None) is None
        assert weight.size(0) == weight.shape[1] == COLUMNS
        assert not weight.requires_grad
        return x @ _value(weight) if self.reads else self.wo(x)


def _value(weight: Tensor) -> Tensor:
    return weight


def cautious(reads: bool = False) -> nn.Module:
    model = Cautious(reads).eval().requires_grad_(False)
    # Swapped from outside, as a model whose source is not known is.
    model.wo = mixq.quantize(nn.ModuleDict({"wo": model.wo})).wo
    return model


class TestCompiled:
    def test_metadata_costs_no_graph_break(self) -> None:
        model, x = cautious(), torch.randn(3, COLUMNS, dtype=torch.float64)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))
        assert compiled(x).dtype == torch.float32, "the input was not cast to the weight's dtype"

    @pytest.mark.parametrize("strict", [False, True])
    def test_export(self, strict: bool) -> None:
        model, x = cautious(), torch.randn(3, COLUMNS, dtype=torch.float64)
        assert torch.equal(torch.export.export(model, (x,), strict=strict).module()(x), model(x))

    def test_computing_is_the_same_error(self) -> None:
        compiled = torch.compile(cautious(reads=True), backend="aot_eager")
        with pytest.raises(ReleasedWeightError, match="linear 'wo'"):
            compiled(torch.randn(3, COLUMNS))


def test_after_loading_the_error_names_the_linear(tmp_path: Any) -> None:
    from tiny_llama import tiny_llama

    mixq.save_pretrained(mixq.quantize(tiny_llama()), tmp_path)
    loaded = mixq.load_pretrained(tmp_path)
    with pytest.raises(ReleasedWeightError, match=r"'model\.layers\.0\.mlp\.down_proj'"):
        loaded.model.layers[0].mlp.down_proj.weight.sum()
