"""`mixq.quantize`: which modules are swapped, what becomes of the others, and what is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from compiling import FEATURES, block, rows
from linear_models import ATTENTION, network, statistics
from linear_models import rows as attention_rows
from rewriting import sqnr
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile import MixqLinear
from mixq_compile.errors import MixqError, OptionError, StatisticsError


def swapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, MixqLinear)]


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {linear.fqn: linear.skip for linear in mixq.report(model).skipped}


def test_linears_are_swapped_in_place_and_the_model_returned() -> None:
    reference, model = block(), block()
    assert mixq.quantize(model) is model
    assert swapped(model) == ["up_proj", "down_proj"]
    assert reasons(model) == {"lm_head": "ignored: its name matches 'lm_head'"}
    x = rows(columns=(3,))
    assert sqnr(reference(x), model(x)) > 30


def test_weights_are_freed() -> None:
    import weakref

    model = block()
    weight = weakref.ref(model.up_proj.weight)
    mixq.quantize(model)
    assert weight() is None


def test_keeping_originals_makes_new_columns_exact() -> None:
    x = rows(columns=(3, 40), size=300.0)
    errors = {}
    for kept in (False, True):
        model = mixq.quantize(block(), keep_originals=kept, threshold=6.0)
        errors[kept] = sqnr(block()(x), model(x))
    assert errors[True] > errors[False] + 3


class Parts(nn.Module):
    """Modules that hold a linear's weight but must not be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, 4, batch_first=True)
        self.special = type("Special", (nn.Linear,), {})(FEATURES, FEATURES)
        self.up_proj = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x)
        return self.up_proj(self.special(mixed))


def test_only_exact_linears_are_swapped() -> None:
    torch.manual_seed(0)
    model = Parts().eval().requires_grad_(False)
    x = torch.randn(2, 5, FEATURES)
    expected = model(x)
    mixq.quantize(model)
    assert swapped(model) == ["up_proj"]
    assert sqnr(expected, model(x)) > 35


def test_code_that_reads_the_weights_dtype_goes_on() -> None:
    """As T5's feed-forward does."""

    class Cautious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wo = nn.Linear(FEATURES, FEATURES)

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.wo.weight, Tensor) and x.dtype != self.wo.weight.dtype != torch.int8:
                x = x.to(self.wo.weight.dtype)
            return self.wo(x)

    model = mixq.quantize(Cautious().to(torch.bfloat16))
    assert model(rows()).dtype == torch.bfloat16


def test_a_module_under_two_names_is_swapped_under_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(FEATURES, FEATURES)
            self.inner = nn.ModuleDict({"other": self.one})

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.inner["other"](x)

    model = Shared().eval().requires_grad_(False)
    expected = model(rows())
    mixq.quantize(model)
    assert isinstance(model.one, MixqLinear)
    assert model.inner["other"] is model.one
    assert sqnr(expected, model(rows())) > 35


def test_tied_weights_are_left_alone() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(50, FEATURES), "score": nn.Linear(FEATURES, 50, bias=False)})
    model["score"].weight = model["embed"].weight
    with pytest.warns(UserWarning, match="its weight is tied to another module's"):
        mixq.quantize(model)
    assert swapped(model) == []


def test_reasons_are_those_of_the_backend() -> None:
    model = nn.ModuleDict(
        {
            "narrow": nn.Linear(FEATURES, 8),
            "wide": nn.Linear(FEATURES, 32, dtype=torch.float64),
            "gate": nn.Linear(FEATURES, 32),
            "up_proj": nn.Linear(FEATURES, 32),
            "lm_head": nn.Linear(FEATURES, 32),
        }
    )
    mixq.quantize(model, ignore=[])
    assert reasons(model) == {
        "narrow": "too small: (8, 64), and an integer product needs 16 of each",
        "wide": "its weight is torch.float64, not a floating-point type that has kernels",
        "gate": "a router, or a product that no linear module owns",
        "lm_head": "the output head stays in 16 or 32 bit",
    }


def test_layers_and_schemes_of_roles() -> None:
    model = mixq.quantize(block(), "w4a4o16", keep_originals=True, layers={"up_proj": "w8a8"})
    assert model.up_proj.scheme.name == "w8a8"
    assert model.down_proj.scheme.name == "w8a8o16", "a down projection keeps 8 bit"


def test_without_force_slow_linears_are_left_alone() -> None:
    """The reference has no speed at all: where nothing else runs, nothing is swapped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mixq.quantize(block(), force=False)
    for name, reason in reasons(model).items():
        assert name == "lm_head" or reason.startswith(("no fast kernel", "not faster with"))


def test_calibrated_columns_are_used() -> None:
    stats = statistics({name: {3: 9.0, 40: 30.0} for name in ATTENTION})
    model = mixq.quantize(network(), stats=stats, miss="static", threshold=6.0)
    assert model.attn.q_proj.outlier_state().columns() == [3, 40]
    original = network().attn.q_proj.weight[:, [3, 40]]
    assert torch.equal(model.attn.q_proj.outlier_weight[:, :2], original)
    x = attention_rows(6, columns=(3, 40))
    assert sqnr(network()(x), model(x)) > 30
    model(attention_rows(6, columns=(20,)))
    assert model.attn.q_proj.outlier_state().columns() == [3, 40], "a static model learned"


def test_four_bits_with_calibration() -> None:
    stats = statistics({name: {3: 30.0} for name in ATTENTION})
    model = mixq.quantize(network(), "w4a4o16", stats=stats, miss="static")
    assert len(model.attn.q_proj.outlier_state().columns()) == 16
    x = attention_rows(6, columns=(3,))
    assert sqnr(network()(x), model(x)) > 15


class TestErrors:
    def test_an_option_that_a_swap_does_not_take(self) -> None:
        with pytest.raises(
            OptionError, match=r"quantize takes no option 'lowering'. Valid: batch_invariant, capacity"
        ):
            mixq.quantize(block(), lowering="eager")

    def test_an_unknown_scheme(self) -> None:
        with pytest.raises(OptionError, match="Did you mean 'w8a8o16'"):
            mixq.quantize(block(), "w8a8o61")

    @pytest.mark.parametrize("options", [{}, {"miss": "static"}, {"miss": "exact"}])
    def test_four_bits_need_originals_or_fixed_columns(self, options: dict[str, str]) -> None:
        with pytest.raises(
            OptionError, match=r"4-bit codes are too coarse|takes its outlier columns from calibration"
        ):
            mixq.quantize(block(), "w4a4o16", **options)

    def test_statistics_of_another_model(self) -> None:
        model = block()
        with pytest.raises(StatisticsError, match="the statistics belong to another model"):
            mixq.quantize(model, stats=statistics({"encoder.fc1": {}}))
        assert swapped(model) == [], "part of the model was swapped before the check"

    def test_statistics_of_another_width(self) -> None:
        with pytest.raises(StatisticsError, match="K is 64, calibrated with 32"):
            mixq.quantize(block(), stats=statistics({"up_proj": {}, "down_proj": {}}, features=32))

    def test_a_model_without_weights(self) -> None:
        with pytest.raises(MixqError, match="on the meta device and has no weights to quantize"):
            mixq.quantize(nn.Sequential(nn.Linear(FEATURES, FEATURES, device="meta")))

    def test_a_single_linear(self) -> None:
        with pytest.raises(MixqError, match=r"wrap it in nn\.Sequential"):
            mixq.quantize(nn.Linear(FEATURES, FEATURES))


class TestWarnings:
    def test_a_model_without_linears(self) -> None:
        with pytest.warns(UserWarning, match="the model has no linears"):
            mixq.quantize(nn.Sequential(nn.ReLU()))

    def test_nothing_swapped(self) -> None:
        with pytest.warns(UserWarning, match=r"none of the 1 linears: too small: \(8, 64\)"):
            mixq.quantize(nn.Sequential(nn.Linear(FEATURES, 8)))

    def test_a_model_that_was_swapped_before_has_no_linears_left(self) -> None:
        model = mixq.quantize(nn.Sequential(nn.Linear(FEATURES, FEATURES)))
        with pytest.warns(UserWarning, match="the model has no linears"):
            mixq.quantize(model)
        assert len(mixq.report(model).quantized) == 1, "the report forgot the first swap"


def test_training_flags_are_kept() -> None:
    model = block().train()
    mixq.quantize(model)
    assert model.up_proj.training
