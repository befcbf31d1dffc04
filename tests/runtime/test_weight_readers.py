"""Models that read a linear's weight: found in their source, left alone with who reads it, right in value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriting import sqnr
from torch import Tensor, nn
from torch.nn import functional as F

import mixq_compile as mixq
from mixq_compile import MixqLinear
from mixq_compile.errors import ReleasedWeightError

FEATURES = 32


class Model(nn.Module):
    """`proj` and `other`; each model below uses `proj` in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(FEATURES, FEATURES)
        self.other = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.use(x))

    def use(self, x: Tensor) -> Tensor:
        return self.proj(x)


class InAFunctional(Model):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


class InAProduct(Model):
    def use(self, x: Tensor) -> Tensor:
        return (self.proj.weight @ x.transpose(-1, -2)).transpose(-1, -2)


class ByData(Model):
    def use(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight.data.T


class ByADetachedOne(Model):
    def use(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight.detach().t()


class ByGetattr(Model):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self.proj, "weight"))  # noqa: B009


class ByANameOfTheLinear(Model):
    def use(self, x: Tensor) -> Tensor:
        linear = self.proj
        return F.linear(x, linear.weight)


class ByANameOfTheWeight(Model):
    def use(self, x: Tensor) -> Tensor:
        weight, bias = self.proj.weight, self.proj.bias
        return F.linear(x.to(weight.dtype), weight, bias)


class ByAComputedName(Model):
    def use(self, x: Tensor) -> Tensor:
        for name in ("proj",):
            x = F.linear(x, getattr(self, f"{name[:2]}oj").weight)
        return x


class ThroughAHelper(Model):
    def use(self, x: Tensor) -> Tensor:
        return apply_transposed(self.proj, x)


class ThroughAMethod(Model):
    def use(self, x: Tensor) -> Tensor:
        return self.transposed(x, linear=self.proj)

    def transposed(self, x: Tensor, linear: nn.Linear) -> Tensor:
        return x @ linear.weight


class ThroughAProperty(Model):
    @property
    def kernel(self) -> Tensor:
        return self.proj.weight

    def use(self, x: Tensor) -> Tensor:
        return x @ self.kernel


class ThroughAnInheritedMethod(InAProduct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class ThroughAConditional(Model):
    def use(self, x: Tensor) -> Tensor:
        weight = self.proj.weight if x.dim() else self.other.bias
        return x @ weight


def apply_transposed(linear: nn.Linear, x: Tensor) -> Tensor:
    return x @ linear.weight


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class FromOutside(nn.Module):
    """The reader is not the linear's own parent."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = Inner(), nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x @ self.inner.proj.weight)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Inner() for _ in range(2))
        self.other = nn.Linear(FEATURES, FEATURES)


class InALoop(Layers):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x @ layer.proj.weight
        return self.other(x)


class InANumberedLoop(Layers):
    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = number + x @ layer.proj.weight
        return self.other(x)


class InAComprehension(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(x @ sum(layer.proj.weight for layer in reversed(self.layers)))


class ByAnIndex(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layers[0](x) @ self.layers[-1].proj.weight)


def left_alone(model: nn.Module) -> dict[str, str]:
    return {linear.fqn: linear.skip or "" for linear in mixq.report(model).skipped}


def prepared(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


READERS: dict[type[nn.Module], dict[str, str]] = {
    InAFunctional: {"proj": "InAFunctional.use"},
    InAProduct: {"proj": "InAProduct.use"},
    ByData: {"proj": "ByData.use"},
    ByADetachedOne: {"proj": "ByADetachedOne.use"},
    ByGetattr: {"proj": "ByGetattr.use"},
    ByANameOfTheLinear: {"proj": "ByANameOfTheLinear.use"},
    ByANameOfTheWeight: {"proj": "ByANameOfTheWeight.use"},
    ByAComputedName: {"proj": "ByAComputedName.use"},
    ThroughAHelper: {"proj": "ThroughAHelper.use"},
    ThroughAMethod: {"proj": "ThroughAMethod.use"},
    ThroughAProperty: {"proj": "ThroughAProperty.kernel"},
    ThroughAnInheritedMethod: {"proj": "ThroughAnInheritedMethod.use"},
    ThroughAConditional: {"proj": "ThroughAConditional.use"},
    FromOutside: {"inner.proj": "FromOutside.forward"},
    InALoop: {f"layers.{place}.proj": "InALoop.forward" for place in range(2)},
    InANumberedLoop: {f"layers.{place}.proj": "InANumberedLoop.forward" for place in range(2)},
    InAComprehension: {f"layers.{place}.proj": "InAComprehension.forward" for place in range(2)},
    ByAnIndex: {"layers.1.proj": "ByAnIndex.forward"},
}


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.__name__)
def test_a_linear_whose_weight_is_read_stays(kind: type[nn.Module]) -> None:
    x = torch.randn(4, FEATURES)
    expected = prepared(kind)(x)
    model = mixq.quantize(prepared(kind))
    assert left_alone(model) == {
        name: f"its weight is read by {reader}" for name, reader in READERS[kind].items()
    }
    assert isinstance(model.other, MixqLinear), "a linear whose weight nobody reads stayed too"
    assert sqnr(expected, model(x)) > 35


class Metadata(Model):
    def use(self, x: Tensor) -> Tensor:
        weight = self.proj.weight
        if isinstance(weight, Tensor) and x.dtype != weight.dtype != torch.int8:
            x = x.to(self.proj.weight.dtype)
        assert self.proj.weight is not None
        assert hasattr(self.proj, "weight")
        assert self.proj.weight.data.shape[0] == weight.size(1) == len(weight)
        return self.proj(x.to(self.proj.weight.device)) + weight.new_zeros(1)


class Initialized(Model):
    def __init__(self) -> None:
        super().__init__()
        self.proj.weight.data.mul_(0.5)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.proj.weight, std=self.proj.weight.std().item())

    def _init_weights(self, module: nn.Module) -> None:
        self.proj.weight.data = self.proj.weight.data / 2

    def tie_weights(self) -> None:
        self.proj.weight = self.other.weight


class InTraining(Model):
    def use(self, x: Tensor) -> Tensor:
        if self.training and x.dim():
            return F.linear(x, self.proj.weight)
        return self.proj(x)


class OfAnother(Model):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.table = nn.LayerNorm(FEATURES), nn.Embedding(4, FEATURES)

    def use(self, x: Tensor) -> Tensor:
        return self.proj(F.layer_norm(x, (FEATURES,), self.norm.weight)) + self.table.weight.sum()


class Wrapper(Model):
    @property
    def weight(self) -> Tensor:
        return self.proj.weight


@pytest.mark.parametrize(
    "kind", [Model, Metadata, Initialized, InTraining, OfAnother, Wrapper], ids=lambda kind: kind.__name__
)
def test_other_models_lose_no_quantized_linear(kind: type[nn.Module]) -> None:
    x = torch.randn(4, FEATURES)
    expected = prepared(kind)(x)
    model = mixq.quantize(prepared(kind))
    assert left_alone(model) == {}
    assert sqnr(expected, model(x)) > 30


def test_a_forward_set_on_an_instance_is_read() -> None:
    model = prepared(Model)
    model.forward = InAProduct.use.__get__(model)
    mixq.quantize(model)
    assert left_alone(model) == {"proj": "its weight is read by Model.use"}


def test_a_model_without_source_says_which_linear_to_leave_alone() -> None:
    space: dict[str, Any] = {"Model": Model}
    exec("class Hidden(Model):\n    def use(self, x):\n        return x @ self.proj.weight", space)
    model = mixq.quantize(prepared(space["Hidden"]))
    assert left_alone(model) == {}
    with pytest.raises(ReleasedWeightError, match=r"ignore=\['lm_head', 'proj'\]"):
        model(torch.randn(4, FEATURES))
    x = torch.randn(4, FEATURES)
    model = mixq.quantize(prepared(space["Hidden"]), ignore=["lm_head", "proj"])
    assert sqnr(prepared(space["Hidden"])(x), model(x)) > 35


def test_calibration_tells_of_a_linear_that_is_never_called() -> None:
    space: dict[str, Any] = {"Model": Model}
    exec("class Hidden(Model):\n    def use(self, x):\n        return x @ self.proj.weight", space)
    x = torch.randn(4, FEATURES)
    with pytest.warns(UserWarning, match="proj never ran during calibration"):
        stats = mixq.calibrate(prepared(space["Hidden"]), [x], progress=False)
    model = mixq.quantize(prepared(space["Hidden"]), stats=stats)
    assert left_alone(model) == {
        "proj": "it never ran during calibration: no batch reached it, or the model reads its weight"
    }
    assert sqnr(prepared(space["Hidden"])(x), model(x)) > 35


def test_a_hook_that_reads_the_weight_is_a_reader() -> None:
    def halve(module: nn.Module, arguments: Any) -> None:
        module.weight.data.mul_(0.5)

    model = prepared(Model)
    model.proj.register_forward_pre_hook(halve)
    mixq.quantize(model)
    assert list(left_alone(model)) == ["proj"]
    assert left_alone(model)["proj"].endswith("halve")
