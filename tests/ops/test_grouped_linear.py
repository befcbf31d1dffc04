"""`mixq::grouped_linear` against its formula in float64, for every format of the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mixq_compile import ops
from mixq_compile.errors import KernelError, OperandError, OptionError
from mixq_compile.formats import INT8, TensorFormat
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.providers import KernelQuery, choose
from mixq_compile.ops.weight_codes import quantize_weight
from mixq_compile.scheme import LowRank, WeightRecipe
from mixq_compile.weights.quantized_weight import QuantizedWeight
from mixq_compile.weights.recipe import make

FORMATS = (
    "int8", "int4", "int2", "int8/16", "int4/16", "int2/7", "int4/128", "uint8", "uint4", "uint4/16",
    "uint2/5", "mxint8/16", "mxint4/16", "mxint2/16",
)  # fmt: skip
ROWS, K, N, C = 6, 45, 37, 16
COLUMNS = (3, 40)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unpacked(weight: QuantizedWeight, fmt: TensorFormat) -> list[list[int]]:
    """The codes less their zero points, read bit by bit."""
    share, found = 8 // fmt.bits, []
    for row in range(N):
        line = []
        for column in range(K):
            byte = int(weight.codes[row, column // share]) & 0xFF
            code = byte >> (column % share * fmt.bits) & (1 << fmt.bits) - 1
            if fmt.signed and code >= 1 << (fmt.bits - 1):
                code -= 1 << fmt.bits
            if weight.zero is not None:
                code -= int(weight.zero.reshape(N, -1)[row, column // (fmt.group or K)])
            line.append(code)
        found.append(line)
    return found


class Problem:
    """One linear, and what a quantization with known columns returned."""

    def __init__(
        self, text: str, dtype: torch.dtype = torch.float32, leading: tuple[int, ...] = (ROWS,)
    ) -> None:
        self.fmt = TensorFormat.parse(text)
        self.matrix = numbers(N, K).to(dtype)
        self.weight = make(WeightRecipe(self.fmt), self.matrix, dtype)
        state = OutlierState.create(K, C, 6.0, "cpu")
        state.preload(COLUMNS)
        self.x = numbers(*leading, K, seed=1).to(dtype)
        self.x[..., list(COLUMNS)] *= 20
        quantized = ops.quantize_affine(
            self.x, state.index, state.column_slot, state.counters, "uint8", "ref"
        )
        self.codes, self.scale, self.zero, self.outliers = quantized
        self.count = state.counters
        self.outlier_weight = torch.zeros(N, C, dtype=dtype)
        self.outlier_weight[:, : len(COLUMNS)] = self.matrix[:, list(COLUMNS)]
        self.bias, self.addend = numbers(N, seed=2).to(dtype), numbers(*leading, N, seed=3).to(dtype)

    def call(self, kernel: str = "ref", **changes: Any) -> Tensor:
        given = {
            "codes": self.codes, "scale": self.scale, "outliers": self.outliers, "count": self.count,
            **{f"weight_{name}": getattr(self.weight, name) for name in ("codes", "scale", "zero")},
            "outlier_weight": self.outlier_weight, "bias": self.bias, "addend": self.addend,
            "weight_format": str(self.fmt),
        }  # fmt: skip
        return ops.grouped_linear(**(given | changes), kernel=kernel)  # type: ignore[no-any-return]

    def steps(self) -> Tensor:
        """Scales `[N, G]` in float64."""
        by_group = self.weight.scale.reshape(N, -1).double()
        shared = self.fmt.scale == "power_of_two"
        return torch.exp2(by_group - 127 - (self.fmt.bits - 1)) if shared else by_group

    def expected(self) -> Tensor:
        """The formula, group by group, in float64."""
        weight = torch.tensor(unpacked(self.weight, self.fmt), dtype=torch.float64)
        size, integers = self.fmt.group or K, self.codes.double()
        total = torch.zeros(*self.codes.shape[:-1], N, dtype=torch.float64)
        for group, start in enumerate(range(0, K, size)):
            part = slice(start, min(start + size, K))
            sums = torch.einsum("...k,nk->...n", integers[..., part], weight[:, part])
            total += self.steps()[:, group] * sums
        product = torch.einsum("...c,nc->...n", self.outliers.double(), self.outlier_weight.double())
        return self.scale.double()[..., None] * total + product + self.bias.double() + self.addend.double()


@pytest.mark.parametrize("text", FORMATS)
def test_fp32(text: str) -> None:
    problem = Problem(text)
    torch.testing.assert_close(problem.call(), problem.expected().float(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["int4/16", "uint4", "mxint4/16"])
def test_it_is_rounded_once(text: str, dtype: torch.dtype) -> None:
    problem = Problem(text, dtype, (2, 3))
    result = problem.call()
    assert (result.dtype, result.shape) == (dtype, (2, 3, N))
    assert torch.equal(result, problem.expected().to(dtype))


def test_integer_sums_are_exact() -> None:
    """Codes of full size over many columns, where fp32 sums would lose units."""
    generator, columns = torch.Generator().manual_seed(0), 40000
    codes = torch.randint(120, 128, (2, columns), generator=generator).to(torch.int8)
    weight = torch.randint(120, 128, (3, columns), generator=generator).to(torch.int8)
    empty = torch.zeros(2, 0, dtype=torch.float64)
    result = ops.grouped_linear(
        codes, torch.ones(2), empty, torch.zeros(1, dtype=torch.int32), weight, torch.ones(3), None,
        torch.zeros(3, 0, dtype=torch.float64), None, None, "int8", "ref",
    )  # fmt: skip
    assert result.long().tolist() == (codes.long() @ weight.long().T).tolist()


@pytest.mark.parametrize("text", ["int8", "int4"])
def test_one_scale_a_row_is_what_mixed_linear_computes(text: str) -> None:
    problem = Problem(text)
    codes, scale = quantize_weight(problem.matrix, WeightRecipe(problem.fmt))
    expected = ops.mixed_linear(
        problem.x, problem.codes, problem.scale, problem.outliers, problem.count, codes, scale,
        problem.outlier_weight, problem.bias, 0, "ref",
    )  # fmt: skip
    torch.testing.assert_close(problem.call(addend=None), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("text", FORMATS)
def test_with_an_affine_activation_and_a_low_rank_part_it_is_the_linear(text: str) -> None:
    """What operators, sums and factors are for: together they give `x · Wᵀ + b` back."""
    problem = Problem(text)
    recipe = WeightRecipe(problem.fmt, low_rank=LowRank(99), sums=True)
    weight = make(recipe, problem.matrix, torch.float32)
    assert weight.left is not None
    assert weight.right is not None
    assert weight.sums is not None
    sums = (problem.steps() * weight.sums.reshape(N, -1)).sum(dim=1)
    correction = -(problem.scale * problem.zero)[:, None] * sums
    # The outliers' product has the original columns, so that the low-rank part must leave them alone.
    inner = problem.x.clone()
    inner[:, list(COLUMNS)] = 0
    addend = correction.float() + (inner @ weight.left) @ weight.right
    exact = problem.x.double() @ problem.matrix.double().T + problem.bias.double()
    step = problem.scale.double()[:, None] * problem.matrix.double().abs().sum(dim=1)
    weight_error = (weight.rounded(problem.fmt, K).double() - problem.matrix.double()).abs().sum(dim=1)
    bound = step + problem.scale.double()[:, None] * weight_error
    error = (problem.call(addend=addend).double() - exact).abs()
    assert bool((error <= bound + 1e-3).all()), f"{float((error / bound).max()):.2f} of the bound"
    wrong = (problem.call(addend=addend - correction.float()).double() - exact).abs()
    assert float(wrong.mean()) > 2 * float(error.mean()), "the correction is not needed by this test"


@pytest.mark.parametrize("text", ["int4/16", "uint4/16"])
def test_rows_and_weights_that_are_not_finite_show_it(text: str) -> None:
    problem = Problem(text)
    scale, weight_scale = problem.scale.clone(), problem.weight.scale.clone()
    scale[2], weight_scale[5, 1] = torch.nan, torch.nan
    found = problem.call(scale=scale, weight_scale=weight_scale)
    bad = torch.zeros(ROWS, N, dtype=torch.bool)
    bad[2], bad[:, 5] = True, True
    assert torch.equal(found.isnan(), bad)
    assert torch.equal(found[~bad], problem.call()[~bad])


def test_slots_beyond_the_count_are_not_read() -> None:
    problem = Problem("int4/16")
    expected = problem.call()
    problem.outliers[:, len(COLUMNS) :], problem.outlier_weight[:, len(COLUMNS) :] = torch.nan, torch.inf
    assert torch.equal(problem.call(), expected)


WRONG = {
    "scales in other groups": ("int4/16", {"weight_format": "int4/8"}, "weight_scale has the shape"),
    "scales a row": ("int4", {"weight_format": "int4/16"}, "weight_scale has the shape"),
    "fewer bytes": ("int4/16", {"weight_format": "int8/16"}, "weight_codes has the dtype uint8"),
    "bits": (
        "int4/16", {"weight_format": "int2/16"},
        r"weight_codes has the shape \[37, 23\]: it must be \[37, 12\], because codes has K = 45",
    ),
    "no zero points": ("int4/16", {"weight_format": "uint4/16"}, "weight_zero is missing"),
    "zero points": ("uint4/16", {"weight_format": "int4/16"}, "weight_zero was given"),
    "exponents": ("int4/16", {"weight_format": "mxint4/16"}, "weight_scale has the dtype float32"),
    "an addend of other columns": ("int4/16", {"addend": torch.zeros(ROWS, N + 1)}, "addend has the shape"),
    "an addend of other rows": ("int4/16", {"addend": torch.zeros(ROWS + 1, N)}, "addend has the leading"),
}  # fmt: skip


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("label", WRONG)
def test_a_weight_that_is_not_in_its_format_is_refused(label: str, fake: bool) -> None:
    text, changes, message = WRONG[label]
    problem = Problem(text)
    if not fake:
        with pytest.raises(OperandError, match=rf"^mixq::grouped_linear: {message}"):
            problem.call(**changes)
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, pytest.raises(OperandError, match=rf"^mixq::grouped_linear: {message}"):
        problem.call(codes=mode.from_tensor(problem.codes), **changes)


def test_a_text_that_is_no_format_is_refused() -> None:
    with pytest.raises(OptionError, match="'int4,16' is no number format"):
        Problem("int4/16").call(weight_format="int4,16")


def test_what_the_reference_supports() -> None:
    def query(weight: str, activation: TensorFormat | None) -> KernelQuery:
        where = torch.device("cpu")
        return KernelQuery("grouped_linear", where, torch.float32, TensorFormat.parse(weight), activation)

    for text in FORMATS:
        assert choose(query(text, INT8)).name == "ref"
        assert choose(query(text, TensorFormat(4, signed=False))).name == "ref"
    with pytest.raises(KernelError, match="not int4/128"):
        choose(query("int4/128", TensorFormat(4, 128)))
    with pytest.raises(KernelError, match="stays in 16 bit"):
        choose(query("int4/128", None))
