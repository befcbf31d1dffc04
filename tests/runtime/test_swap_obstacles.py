"""What hangs on a linear beside its weight: computed weights, own parts, hooks, attributes, references."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriting import sqnr
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import mixq_compile as mixq
from mixq_compile import MixqLinear

FEATURES = 32
X = torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(1))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, FEATURES)
        self.down = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def pair() -> Pair:
    torch.manual_seed(0)
    return Pair().eval()


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {linear.fqn: linear.skip for linear in mixq.report(model).skipped}


def reloaded(model: nn.Module) -> nn.Module:
    """The model with other numbers, as after loading a checkpoint: computed weights have not followed."""
    generator = torch.Generator().manual_seed(7)
    state = {
        name: value if name.endswith("mask") else torch.randn(value.shape, generator=generator) * 0.2
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.requires_grad_(False)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "weight_norm, hooks": (nn.utils.weight_norm, "weight"),
    "spectral_norm, hooks": (nn.utils.spectral_norm, "weight"),
    "l1 pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "weight"),
    "random pruning": (lambda m: prune.random_unstructured(m, "weight", 0.5), "weight"),
    "pruned bias": (lambda m: prune.l1_unstructured(m, "bias", 0.5), "bias"),
    "weight_norm": (parametrizations.weight_norm, "weight"),
    "spectral_norm": (parametrizations.spectral_norm, "weight"),
    "orthogonal": (parametrizations.orthogonal, "weight"),
    "own parametrization": (
        lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
        "weight",
    ),
    "parametrized bias": (lambda m: parametrize.register_parametrization(m, "bias", Doubled()), "bias"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_left_alone_and_right(name: str) -> None:
    """What stands in `weight` is from before loading: quantizing it would be another model."""
    compute, part = COMPUTED[name]

    def made() -> nn.Module:
        model = pair()
        torch.manual_seed(3)
        compute(model.up)
        return reloaded(model)

    model = mixq.quantize(made())
    assert reasons(model) == {"up": f"its {part} is computed, not a parameter"}
    assert isinstance(model.down, MixqLinear)
    assert sqnr(made()(X), model(X)) > 35


def lora(linear: nn.Linear) -> None:
    linear.lora_a, linear.lora_b = nn.Linear(FEATURES, 4), nn.Linear(4, FEATURES)


def parameter(linear: nn.Linear) -> None:
    linear.gain = nn.Parameter(torch.ones(1))


def replaced_forward(linear: nn.Linear) -> None:
    before = linear.forward
    linear.forward = lambda x: 3 * before(x)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


OWN: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "LoRA": (lora, "it has parameters, buffers or modules of its own: lora_a, lora_b"),
    "parameter": (parameter, "it has parameters, buffers or modules of its own: gain"),
    "buffer": (
        lambda m: m.register_buffer("step", torch.ones(1)),
        "it has parameters, buffers or modules of its own: step",
    ),
    "forward": (replaced_forward, "its forward is replaced on the instance"),
    "state-dict hook": (
        lambda m: m.register_state_dict_post_hook(lambda *_: None), "it has state-dict hooks",
    ),
    "loading hook": (
        lambda m: m.register_load_state_dict_pre_hook(lambda *_: None), "it has state-dict hooks",
    ),
    "backward hook": (
        lambda m: m.register_full_backward_hook(lambda *_: None), "it has backward hooks",
    ),
    "attribute of ours": (
        lambda m: setattr(m, "scheme", "mine"),
        "it has an attribute 'scheme' of its own, which a MixqLinear needs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_linear_with_parts_of_its_own_is_left_alone(name: str) -> None:
    add, reason = OWN[name]
    model = pair()
    add(model.up)
    expected = model(X)
    mixq.quantize(model)
    assert reasons(model)["up"] == reason
    assert isinstance(model.down, MixqLinear)
    assert sqnr(expected, model(X)) > 35


def test_a_subclass_stands_in_the_report() -> None:
    model = pair()
    model.up = Scaled(FEATURES, FEATURES)
    expected = model(X)
    mixq.quantize(model)
    assert reasons(model) == {"up": "its class Scaled, a subclass of nn.Linear, may compute something else"}
    assert sqnr(expected, model(X)) > 35


def test_a_lazy_linear_that_has_not_run_stands_in_the_report() -> None:
    model = pair()
    model.up = nn.LazyLinear(FEATURES)
    mixq.quantize(model)
    assert reasons(model) == {"up": "its weight has no shape yet: run the model once first"}
    assert model(X).shape == (6, FEATURES)


def test_a_lazy_linear_that_has_run_is_quantized() -> None:
    model = nn.Sequential(nn.LazyLinear(FEATURES))
    expected = model(X)
    assert isinstance(mixq.quantize(model)[0], MixqLinear)
    assert sqnr(expected, model(X)) > 35


def test_a_bilinear_is_no_linear() -> None:
    model = nn.ModuleDict({"both": nn.Bilinear(FEATURES, FEATURES, FEATURES), "one": pair().up})
    expected = model["both"](X, X)
    mixq.quantize(model)
    assert torch.equal(model["both"](X, X), expected)
    assert isinstance(model["one"], MixqLinear)


class TestHooks:
    """Registered before the swap, they run after it, and their handles remove them."""

    @pytest.mark.parametrize("with_kwargs", [False, True])
    def test_a_pre_hook(self, with_kwargs: bool) -> None:
        def double(module: nn.Module, args: Any, kwargs: Any = None) -> Any:
            doubled = tuple(2 * each for each in args)
            return (doubled, kwargs) if with_kwargs else doubled

        model = pair()
        handle = model.up.register_forward_pre_hook(double, with_kwargs=with_kwargs)
        expected = model(X)
        mixq.quantize(model)
        assert reasons(model) == {}
        assert sqnr(expected, model(X)) > 35, "the hook was dropped"
        handle.remove()
        assert sqnr(pair()(X), model(X)) > 35, "the handle removes the hook no more"

    @pytest.mark.parametrize("with_kwargs", [False, True])
    def test_a_forward_hook(self, with_kwargs: bool) -> None:
        def triple(module: nn.Module, args: Any, *rest: Any) -> Tensor:
            assert isinstance(module, (nn.Linear, MixqLinear))
            return 3 * rest[-1]

        model = pair()
        handle = model.down.register_forward_hook(triple, with_kwargs=with_kwargs)
        expected = model(X)
        mixq.quantize(model)
        assert sqnr(expected, model(X)) > 35, "the hook was dropped"
        handle.remove()
        assert sqnr(pair()(X), model(X)) > 35, "the handle removes the hook no more"

    def test_a_hook_that_is_always_called(self) -> None:
        called: list[str] = []
        model = pair()
        model.up.register_forward_hook(lambda *_: called.append("up"), always_call=True)
        mixq.quantize(model)
        with pytest.raises(AttributeError):
            model.up(None)
        assert called == ["up"]

    def test_a_hook_registered_after_the_swap_is_removed_alone(self) -> None:
        seen: list[str] = []
        model = pair()
        model.up.register_forward_hook(lambda *_: seen.append("before"))
        mixq.quantize(model)
        model.up.register_forward_hook(lambda *_: seen.append("after")).remove()
        model(X)
        assert seen == ["before"]

    def test_calibration_leaves_no_hook_behind(self) -> None:
        model = pair()
        mixq.quantize(model, stats=mixq.calibrate(model, [X], progress=False))
        assert not model.up._forward_pre_hooks


def test_attributes_set_on_a_linear_are_kept() -> None:
    model = pair()
    model.up.tag, model.up.group = "first", [1, 2]
    group = model.up.group
    mixq.quantize(model)
    assert model.up.tag == "first"
    assert model.up.group is group


class Twice(nn.Module):
    """One linear under two names of one parent."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(FEATURES, FEATURES)
        self.two = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_both_names_in_one_parent_are_swapped() -> None:
    torch.manual_seed(0)
    model = Twice().eval().requires_grad_(False)
    expected, weight = model(X), weakref.ref(model.one.weight)
    mixq.quantize(model)
    assert isinstance(model.one, MixqLinear)
    assert model.two is model.one
    assert weight() is None, "the second name kept the 16-bit weight"
    assert sqnr(expected, model(X)) > 35


def in_a_list(model: Pair) -> Callable[[Tensor], Tensor]:
    model.steps = [model.up, torch.relu]
    return lambda x: model.steps[0](x)


def in_a_dict(model: Pair) -> Callable[[Tensor], Tensor]:
    model.steps = {"first": model.up}
    return lambda x: model.steps["first"](x)


@pytest.mark.parametrize("hold", [in_a_list, in_a_dict])
def test_lists_and_dicts_of_a_module_are_swapped_with_it(hold: Any) -> None:
    model = pair().requires_grad_(False)
    called = hold(model)
    expected, weight = called(X), weakref.ref(model.up.weight)
    mixq.quantize(model)
    assert weight() is None, "the container kept the 16-bit weight"
    assert torch.equal(called(X), model.up(X)), "the container's linear is another"
    assert sqnr(expected, called(X)) > 35


HOLDERS: dict[str, Callable[[nn.Linear], Any]] = {
    "tuple": lambda linear: (linear, 1),
    "list in a list": lambda linear: [[linear]],
    "set": lambda linear: {linear},
    "partial": lambda linear: functools.partial(torch.relu, linear),
    "bound method": lambda linear: linear.forward,
    "closure": lambda linear: lambda x: linear(x),
    "its weight": lambda linear: [linear.weight],
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_linear_held_where_the_swap_does_not_reach_is_left_alone(name: str) -> None:
    model = pair()
    model.held = HOLDERS[name](model.up)
    mixq.quantize(model)
    assert reasons(model) == {"up": "Pair.held holds it too, where a swap does not reach it"}
    assert isinstance(model.down, MixqLinear)


def test_functional_call_of_a_swapped_model() -> None:
    model = mixq.quantize(pair().requires_grad_(False))
    bias = torch.full((FEATURES,), 5.0)
    moved = torch.func.functional_call(model, {"down.bias": bias}, (X,))
    assert torch.allclose(moved - model(X), (bias - model.down.bias).expand(6, FEATURES), atol=1e-5)
