"""What quantizing on the fly says about memory, before it is spent."""

from __future__ import annotations

import logging

import pytest
import torch
from compiling import block, compiled, rows

from mixq_compile.errors import MixqError
from mixq_compile.ops.joint_rows import held_bytes
from mixq_compile.runtime import memory
from mixq_compile.runtime.weight_store import STORE, WeightStore
from mixq_compile.schemes.registry import get_scheme


def test_packing_that_does_not_fit_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    model = block()
    with pytest.raises(Exception, match=r"packing 2 weights needs .* GiB free") as caught:
        compiled(model)(rows())
    message = str(caught.value)
    assert "mixq_compile.quantize(model) swaps the linears" in message
    assert "'release_weights': True" in message
    assert not any(STORE.codes(weight) for weight in model.parameters())


def test_a_reserve_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(1000, 1000, dtype=torch.bfloat16)
    scheme = get_scheme("w8a8o16").with_outliers(capacity=32)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_124_000)
    with pytest.raises(MixqError, match="packing 1 weights"):
        memory.check([(weight, scheme)], keeps_originals=True)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_134_000)
    memory.check([(weight, scheme)], keeps_originals=True)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 620_000)
    four = get_scheme("w4a8o16").with_outliers(capacity=32)
    memory.check([(weight, four)], keeps_originals=True)


@pytest.mark.parametrize("name", ["w8a8o16", "w4a4o16", "w8a8", "w8a16"])
def test_what_is_counted_is_what_packing_keeps(name: str) -> None:
    """Outlier columns are a sixteenth of the codes and more: as much as the reserve."""
    weight, scheme = torch.randn(80, 3000, dtype=torch.bfloat16), get_scheme(name)
    packed = WeightStore().pack(weight, scheme, torch.bfloat16)
    kept = (packed.weight_codes, packed.weight_scale, packed.outlier_weight, packed.cached_index)
    assert memory.packed_bytes(weight, scheme) == sum(held_bytes(tensor) for tensor in kept)


def test_an_unknown_amount_of_memory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    memory.check([(torch.zeros(16, 16), get_scheme("w8a8o16"))], keeps_originals=True)


def test_the_message_gives_the_figure_and_both_remedies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "WORTH_SAYING", 0)
    with caplog.at_level(logging.WARNING):
        memory.check(
            [(torch.zeros(64, 64, dtype=torch.bfloat16), get_scheme("w8a8o16"))], keeps_originals=True
        )
    (record,) = caplog.records
    # For each row of 128 bytes 64 of codes and 4 of scale, and 16 columns of 2 bytes with 4 of index each.
    assert "1.79 times the memory" in record.message
    assert "mixq_compile.quantize(model)" in record.message
    assert "release_weights" in record.message


def test_it_is_said_once_for_a_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "WORTH_SAYING", 0)
    model = block()
    fast = compiled(model, dynamic=False)
    with caplog.at_level(logging.WARNING, logger="mixq_compile.runtime.memory"):
        for count in (6, 7, 8):
            fast(rows(count))
    said = [record for record in caplog.records if "times the memory" in record.message]
    assert len(said) == 1


def test_a_small_model_is_not_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compiled(block())(rows())
    assert not caplog.records


def test_nothing_is_said_where_the_weights_are_freed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "WORTH_SAYING", 0)
    with caplog.at_level(logging.WARNING):
        compiled(block(), release_weights=True)(rows())
    assert not caplog.records


def test_only_weights_that_are_quantized_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(memory, "check", lambda weights, keeps: seen.append(len(weights)))
    compiled(block(), ignore=["lm_head", "down_proj"])(rows())
    assert seen == [1]


def test_free_memory_of_this_machine_is_known() -> None:
    found = memory.free_bytes(torch.device("cpu"))
    assert found is None or found > 1 << 20
