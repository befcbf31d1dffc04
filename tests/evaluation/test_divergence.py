"""Divergence of other models from a reference: what the logits of each window say, against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mixq_compile.errors import OptionError
from mixq_compile.evaluation import divergence, scores
from mixq_compile.evaluation.divergence import REFERENCE, WindowScore
from mixq_compile.evaluation.protocols import Window

VOCABULARY = 11
WINDOWS = [Window((1, 5, 3, 8, 2), 1), Window((1, 4, 4, 9, 0), 3), Window((1, 7, 2), 1)]


class Table(nn.Module):
    """Logits by the token before, of one seed; `other` logits are mixed in by `share`."""

    def __init__(self, seed: int = 0, share: float = 0.0) -> None:
        super().__init__()
        made = [
            torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(s))
            for s in (seed, seed + 1)
        ]
        self.table = nn.Parameter(made[0] * (1 - share) + made[1] * share, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def by_hand(share: float) -> dict[str, float]:
    """Sums over all scored tokens, one token after the other, in float64."""
    exact, own = Table().table.double(), Table(share=share).table.double()
    sums = {"tokens": 0.0, "nll": 0.0, "exact": 0.0, "kl": 0.0, "agreeing": 0.0, "signal": 0.0, "noise": 0.0}
    for window in WINDOWS:
        for place in range(window.first_scored, len(window.tokens)):
            before, target = window.tokens[place - 1], window.tokens[place]
            p, q = (torch.softmax(table[before], 0) for table in (exact, own))
            sums["tokens"] += 1
            sums["nll"] -= math.log(q[target])
            sums["exact"] -= math.log(p[target])
            sums["kl"] += sum(float(p[i] * (p[i].log() - q[i].log())) for i in range(VOCABULARY))
            sums["agreeing"] += int(p.argmax() == q.argmax())
            sums["signal"] += float((exact[before] ** 2).sum())
            sums["noise"] += float(((exact[before] - own[before]) ** 2).sum())
    return sums


def collected(models: dict[str, nn.Module], batch_size: int = 1) -> dict[str, list[WindowScore]]:
    found: dict[str, list[WindowScore]] = {}
    for batch in scores(Table(), models, WINDOWS, batch_size=batch_size):
        for label, each in batch.items():
            found.setdefault(label, []).extend(each)
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("share", [0.02, 0.4])
def test_every_figure_is_what_the_logits_say(share: float, batch_size: int) -> None:
    found = collected({"other": Table(share=share)}, batch_size)
    result, wanted = divergence(found[REFERENCE], found["other"]), by_hand(share)
    count = wanted["tokens"]
    assert result.tokens == count
    assert result.perplexity == pytest.approx(math.exp(wanted["nll"] / count), rel=1e-5)
    assert result.delta == pytest.approx(math.exp((wanted["nll"] - wanted["exact"]) / count) - 1, abs=1e-5)
    assert result.kl == pytest.approx(wanted["kl"] / count, rel=1e-3)
    assert result.top1 == wanted["agreeing"] / count
    assert result.sqnr_db == pytest.approx(10 * math.log10(wanted["signal"] / wanted["noise"]), abs=1e-3)


def test_the_reference_does_not_differ_from_itself() -> None:
    found = collected({"same": Table()})
    for label in (REFERENCE, "same"):
        result = divergence(found[REFERENCE], found[label])
        assert (result.delta, result.delta_error, result.kl, result.top1) == (0.0, 0.0, 0.0, 1.0)
        assert result.sqnr_db == math.inf


def test_the_spread_of_the_text_cancels_in_the_difference() -> None:
    """Windows differ much, models little: only the paired error shows that they do."""
    found = collected({"other": Table(share=0.02)})
    result = divergence(found[REFERENCE], found["other"])
    assert result.perplexity_error is not None
    assert result.delta_error is not None
    assert result.delta_error < 0.2 * result.perplexity_error / result.perplexity


def test_one_window_has_no_standard_error() -> None:
    found = collected({"other": Table(share=0.4)})
    result = divergence(found[REFERENCE][:1], found["other"][:1])
    assert (result.perplexity_error, result.delta_error) == (None, None)


def test_other_windows_do_not_compare() -> None:
    found = collected({"other": Table(share=0.4)})
    for own in ([], found["other"][:1], found["other"][::-1]):
        with pytest.raises(OptionError, match="the windows that the reference has read"):
            divergence(found[REFERENCE], own)


def test_a_broken_model_is_no_number_and_no_crash() -> None:
    broken = Table()
    broken.table[3, 4] = torch.nan
    found = collected({"broken": broken})
    result = divergence(found[REFERENCE], found["broken"])
    assert math.isnan(result.kl)
    assert math.isnan(result.perplexity)
    assert math.isnan(result.sqnr_db)
