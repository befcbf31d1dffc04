"""`nn.TransformerEncoder`, whose fast path reads its linears' weights: swapped, calibrated, compiled."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from rewriting import sqnr
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile import MixqLinear

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

WIDTH, LENGTH = 64, 10
LINEARS = [f"layers.{layer}.linear{place}" for layer in range(2) for place in (1, 2)]


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)


def vectors() -> Tensor:
    return torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def padding() -> Tensor:
    """True at positions that are no tokens."""
    return torch.arange(LENGTH) >= torch.tensor([[LENGTH], [7], [4]])


def swapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, MixqLinear)]


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"src_key_padding_mask": padding()},
    "causal": {"mask": nn.Transformer.generate_square_subsequent_mask(LENGTH), "is_causal": True},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("ignored", "expected"),
    [([], LINEARS), (["layers.0.*"], LINEARS[2:]), (["layers.1.*"], LINEARS[:2])],
    ids=["all", "second layer", "first layer"],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_it_is_right_with_every_mask(
    mask: str, ignored: list[str], expected: list[str], gradients: bool
) -> None:
    """With padding and a first layer in 16 bit the encoder hands nested tensors to the second."""
    x, tokens = vectors(), ~padding() if mask == "padding" else slice(None)
    with torch.set_grad_enabled(gradients):
        reference = encoder()(x, **MASKS[mask])[tokens]
        model = mixq.quantize(encoder(), ignore=ignored)
        assert swapped(model) == expected
        assert sqnr(reference, model(x, **MASKS[mask])[tokens]) > 40


def test_its_attention_is_named_as_left_alone() -> None:
    skipped = {linear.fqn: linear.skip for linear in mixq.report(mixq.quantize(encoder())).skipped}
    reason = "its weight is read by MultiheadAttention.forward"
    assert skipped == {f"layers.{layer}.self_attn.out_proj": reason for layer in range(2)}


def test_the_encoder_and_decoder_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, 4, 1, 1, 128, batch_first=True).eval().requires_grad_(False)
    quantized = mixq.quantize(copy.deepcopy(model))
    assert len(swapped(quantized)) == 4
    assert sqnr(model(vectors(), vectors()), quantized(vectors(), vectors())) > 40


class TestNestedTensors:
    def parts(self) -> list[Tensor]:
        return [vectors()[0, :4], vectors()[1, :7]]

    def test_through_a_layer(self) -> None:
        layer, parts = encoder().layers[0], self.parts()
        expected = layer(torch.nested.nested_tensor(parts)).unbind()
        found = mixq.quantize(layer)(torch.nested.nested_tensor(parts))
        assert found.is_nested
        for right, part in zip(expected, found.unbind(), strict=True):
            assert sqnr(right, part) > 40

    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
    def test_a_linear_gives_what_it_gives_for_each_part(self, layout: torch.layout) -> None:
        linear = mixq.quantize(nn.Sequential(nn.Linear(WIDTH, 32).requires_grad_(False)), "w8a8")[0]
        found = linear(torch.nested.nested_tensor(self.parts(), layout=layout))
        assert found.layout is layout
        for part, given in zip(found.unbind(), self.parts(), strict=True):
            assert torch.allclose(part, linear(given), atol=1e-6)


class TestCalibration:
    def test_sees_every_linear_of_a_padded_batch(self) -> None:
        batch = {"src": vectors(), "src_key_padding_mask": padding()}
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            stats = mixq.calibrate(encoder(), [batch], progress=False)
        assert sorted(stats) == LINEARS
        assert stats["layers.0.linear1"].rows == 3 * LENGTH

    @pytest.mark.parametrize("before", [True, False])
    def test_leaves_the_fast_path_as_it_was(self, before: bool) -> None:
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(before)
        try:
            mixq.calibrate(encoder(), [vectors()], progress=False)
            assert torch.backends.mha.get_fastpath_enabled() is before
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)

    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
    def test_counts_the_rows_of_nested_tensors(self, layout: torch.layout) -> None:
        parts = [vectors()[0, :4], vectors()[1, :7]]
        model = nn.Sequential(nn.Linear(WIDTH, 32))
        stats = mixq.calibrate(model, [torch.nested.nested_tensor(parts, layout=layout)], progress=False)
        assert stats["0"].rows == 11
        assert torch.equal(stats["0"].absmax, torch.cat(parts).abs().amax(0))


class TestCompiled:
    def test_a_swapped_encoder(self) -> None:
        model = mixq.quantize(encoder())
        with torch.no_grad():
            expected = model(vectors())
            compiled = torch.compile(model, backend="mixq", options={"lowering": "eager"})
            assert torch.allclose(compiled(vectors()), expected, atol=1e-5)

    def test_without_the_fast_path_the_backend_sees_the_linears(self) -> None:
        model = encoder()
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad():
                reference = model(vectors())
                compiled = torch.compile(
                    model, backend="mixq", options={"force": True, "lowering": "eager", "kernel": "ref"}
                )
                assert sqnr(reference, compiled(vectors())) > 35
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)
        assert {linear.fqn for linear in mixq.report(compiled).quantized} >= set(LINEARS)
