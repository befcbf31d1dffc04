"""Kinds of statistics: which are collected, what lacks of them says, what linears share, and their file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mixq_compile.calibration import CalibrationStats, calibrate
from mixq_compile.calibration.collected import gram
from mixq_compile.errors import OptionError, StatisticsError

EVERY = ("channels", "gram", "sample")


class Attention(nn.Module):
    """q and k read one tensor, o another; `between` may change the input between q and k."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.k = nn.Linear(6, 6)
        self.o = nn.Linear(6, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        q = self.q(x)
        return self.o(q + self.k(self.between(x)))


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(rows: Tensor) -> Tensor:
    return (rows.double().mT @ rows.double()).float()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """K of each gram accumulator that was made anew."""
    sizes: list[int] = []
    original = gram.ACCUMULATOR

    def make(in_features: int, device: torch.device) -> Any:
        sizes.append(in_features)
        return original(in_features, device)

    monkeypatch.setattr(gram, "ACCUMULATOR", make)
    return sizes


class TestChoice:
    def test_channels_alone_are_the_default(self) -> None:
        stats = calibrate(Attention(), [random_rows(5, 6)])
        assert stats.kinds == stats["q"].kinds == ("channels",)

    @pytest.mark.parametrize("kinds", [("gram", "sample"), ["sample", "gram", "channels"], EVERY])
    def test_channels_are_always_there_and_the_order_is_one(self, kinds: Any) -> None:
        stats = calibrate(Attention(), [random_rows(5, 6)], kinds=kinds)
        assert stats.kinds == stats["q"].kinds == EVERY
        assert stats["q"].absmax.shape == (6,)

    def test_further_kinds_change_nothing_of_the_channels(self) -> None:
        torch.manual_seed(0)
        model, batches = Attention(), [random_rows(5, 6), random_rows(3, 6, seed=1)]
        alone, every = calibrate(model, batches), calibrate(model, batches, kinds=EVERY)
        for fqn in alone:
            for name in ("absmax", "mean_magnitude", "mean_square", "rows_above"):
                assert torch.equal(getattr(every[fqn], name), getattr(alone[fqn], name)), (fqn, name)

    def test_an_unknown_kind_is_refused_with_the_valid_ones(self) -> None:
        with pytest.raises(OptionError, match=r"'grams'.*'gram'\?.*channels, gram, sample"):
            calibrate(Attention(), [random_rows(5, 6)], kinds=("grams",))

    @pytest.mark.parametrize(("kinds", "why"), [("gram", r"kinds=\('gram',\)"), ((), "at least one of")])
    def test_a_text_and_nothing_are_refused(self, kinds: Any, why: str) -> None:
        with pytest.raises(OptionError, match=why):
            calibrate(Attention(), [random_rows(5, 6)], kinds=kinds)

    @pytest.mark.parametrize(
        ("collected", "lacking", "again"),
        [
            (("channels",), "gram", r"kinds=\('gram',\)"),
            (("channels",), "sample", r"kinds=\('sample',\)"),
            (("gram",), "sample", r"kinds=\('gram', 'sample',\)"),
        ],
    )
    def test_what_was_not_collected_says_how_to_calibrate_again(
        self, collected: tuple[str, ...], lacking: str, again: str
    ) -> None:
        entry = calibrate(Attention(), [random_rows(5, 6)], kinds=collected)["q"]
        with pytest.raises(StatisticsError, match=f"the {lacking} of .*'q' was not collected.*{again}"):
            getattr(entry, lacking)

    def test_statistics_of_different_kinds_do_not_mix(self) -> None:
        stats = calibrate(Attention(), [random_rows(5, 6)], kinds=("gram",))
        mixed = {**stats.linears, "o": replace(stats["o"], further={})}
        with pytest.raises(StatisticsError, match=r"different kinds \(channels; channels and gram\)"):
            replace(stats, linears=mixed)


class TestSharing:
    def test_linears_that_read_one_tensor_share_one_accumulator(self, made: list[int]) -> None:
        batches = [random_rows(5, 6), random_rows(2, 3, 6, seed=1)]
        stats = calibrate(Attention(), batches, kinds=EVERY)
        assert len(made) == 2, "q and k together, and o"
        assert stats["q"].gram is stats["k"].gram
        rows = torch.cat([batch.reshape(-1, 6) for batch in batches])
        torch.testing.assert_close(stats["q"].gram, product(rows))
        assert torch.equal(stats["k"].sample, rows)

    @pytest.mark.parametrize(
        "write",
        [lambda x: x.mul_(2), lambda x: x.data.mul_(2), lambda x: x[:].detach().mul_(2)],
        ids=["in place", "through data", "through an alias"],
    )
    def test_a_tensor_written_between_two_calls_is_not_shared(self, write: Callable[[Tensor], Any]) -> None:
        def between(x: Tensor) -> Tensor:
            write(x)
            return x

        x = random_rows(5, 6)
        stats = calibrate(Attention(between), [x, 3 * x], kinds=("gram",))
        rows = torch.cat([x, 3 * x])
        torch.testing.assert_close(stats["q"].gram, product(rows))
        torch.testing.assert_close(stats["k"].gram, product(2 * rows))
        torch.testing.assert_close(stats["k"].absmax, 2 * rows.abs().amax(dim=0))

    @pytest.mark.parametrize("changed", [0, 1, 2])
    def test_linears_that_part_in_some_batch_keep_what_each_saw(self, changed: int) -> None:
        calls = iter(range(9))

        def between(x: Tensor) -> Tensor:
            return 2 * x if next(calls) == changed else x

        batches = [random_rows(5, 6, seed=seed) for seed in range(3)]
        stats = calibrate(Attention(between), batches, kinds=EVERY)
        seen = [2 * batch if place == changed else batch for place, batch in enumerate(batches)]
        for fqn, rows in (("q", torch.cat(batches)), ("k", torch.cat(seen))):
            torch.testing.assert_close(stats[fqn].gram, product(rows), msg=f"gram of {fqn}")
            assert torch.equal(stats[fqn].sample, rows), f"sample of {fqn}"
            assert torch.equal(stats[fqn].absmax, rows.abs().amax(dim=0)), f"absmax of {fqn}"
            assert stats[fqn].rows == 15

    def test_a_linear_that_sits_out_a_batch_saw_only_the_others(self) -> None:
        class Sometimes(Attention):
            def forward(self, x: Tensor) -> Tensor:
                return self.o(self.q(x) + self.k(x) if x.shape[0] > 3 else self.q(x))

        first, second, third = random_rows(5, 6), random_rows(3, 6, seed=1), random_rows(4, 6, seed=2)
        stats = calibrate(Sometimes(), [first, second, third], kinds=EVERY)
        assert (stats["q"].rows, stats["k"].rows) == (12, 9)
        torch.testing.assert_close(stats["q"].gram, product(torch.cat([first, second, third])))
        torch.testing.assert_close(stats["k"].gram, product(torch.cat([first, third])))

    def test_a_linear_called_twice_on_one_tensor_counts_it_twice(self) -> None:
        class Twice(Attention):
            def forward(self, x: Tensor) -> Tensor:
                return self.o(self.q(x) + self.k(x) + self.q(x))

        x = random_rows(5, 6)
        stats = calibrate(Twice(), [x, x], kinds=("gram",))
        assert (stats["q"].rows, stats["k"].rows) == (20, 10)
        torch.testing.assert_close(stats["q"].gram, 4 * product(x))
        torch.testing.assert_close(stats["k"].gram, 2 * product(x))

    def test_rows_that_are_not_finite_hinder_no_sharing(self, made: list[int]) -> None:
        x = random_rows(5, 6)
        x[2, 3] = float("nan")
        with pytest.warns(UserWarning, match="NaN or infinity"):
            stats = calibrate(Attention(), [x, x], kinds=("gram",))
        assert len(made) == 2
        assert (stats["k"].rows, stats["k"].nonfinite_rows) == (8, 2)


class TestHashAndFile:
    @pytest.fixture
    def stats(self) -> CalibrationStats:
        torch.manual_seed(0)
        return calibrate(Attention(), [random_rows(5, 6)], kinds=EVERY)

    def test_what_is_loaded_equals_what_was_saved(self, stats: CalibrationStats, tmp_path: Path) -> None:
        stats.save(tmp_path / "stats")
        loaded = CalibrationStats.load(tmp_path / "stats")
        assert loaded.kinds == EVERY
        assert loaded.sha256() == stats.sha256()
        for fqn in stats:
            assert torch.equal(loaded[fqn].gram, stats[fqn].gram), fqn
            assert torch.equal(loaded[fqn].sample, stats[fqn].sample), fqn

    def test_what_linears_share_is_written_once_and_shared_again(
        self, stats: CalibrationStats, tmp_path: Path
    ) -> None:
        stats.save(tmp_path / "stats")
        with safe_open(tmp_path / "stats", framework="pt") as file:
            names = [name for name in file.keys() if name.endswith((".gram", ".sample"))]  # noqa: SIM118
        assert sorted(names) == ["o.gram", "o.sample", "q.gram", "q.sample"]
        loaded = CalibrationStats.load(tmp_path / "stats")
        assert loaded["k"].gram is loaded["q"].gram

    def test_the_hash_tells_kinds_and_values_and_not_what_is_shared(self, stats: CalibrationStats) -> None:
        def changed(**further: Tensor) -> str:
            k = replace(stats["k"], further={**stats["k"].further, **further})
            return replace(stats, linears={**stats.linears, "k": k}).sha256()

        def only(*kinds: str) -> str:
            linears = {
                fqn: replace(entry, further={kind: entry.further[kind] for kind in kinds})
                for fqn, entry in stats.linears.items()
            }
            return replace(stats, linears=linears).sha256()

        assert changed(gram=stats["k"].gram.clone()) == stats.sha256()
        hashes = [
            stats.sha256(), changed(gram=stats["k"].gram + 1), changed(sample=stats["k"].sample[1:]),
            only("gram"), only("sample"), only(),
        ]  # fmt: skip
        assert len(set(hashes)) == 6

    def test_a_header_that_names_no_such_tensor_is_damaged(
        self, stats: CalibrationStats, tmp_path: Path
    ) -> None:
        stats.save(tmp_path / "stats")
        for before, after in (('"q"}, "sample"', '"p"}, "sample"'), ('"gram"', '"cube"')):
            with safe_open(tmp_path / "stats", framework="pt") as file:
                header = file.metadata()["mixq_calibration"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = {"mixq_calibration": header.replace(before, after).replace('"k": "q"', '"k": "p"')}
            safetensors.torch.save_file(tensors, tmp_path / "other", metadata=metadata)
            with pytest.raises(StatisticsError, match="damaged: KeyError"):
                CalibrationStats.load(tmp_path / "other")

    def test_a_gram_of_another_shape_is_damaged(self, stats: CalibrationStats, tmp_path: Path) -> None:
        wrong = {
            fqn: replace(entry, further={**entry.further, "gram": torch.zeros(6, 5)})
            for fqn, entry in stats.linears.items()
        }
        replace(stats, linears=wrong).save(tmp_path / "stats")
        with pytest.raises(StatisticsError, match=r"q\.gram does not fit 6 input channels"):
            CalibrationStats.load(tmp_path / "stats")


class TestFilesOfChannelsAlone:
    """Their layout is that of the first release, which knew no other kind."""

    def written_by_the_first_release(self, path: Path) -> dict[str, Tensor]:
        tensors = {
            "fc.absmax": torch.tensor([1.0, 8.0]),
            "fc.mean_magnitude": torch.tensor([0.5, 4.0]),
            "fc.mean_square": torch.tensor([0.25, 20.0]),
            "fc.rows_above": torch.tensor([[0, 4]]),
        }
        facts = {
            "schema_version": 1,
            "package_version": "0.1.0",
            "model_class": "tests.Model",
            "dtype": "float32",
            "total_rows": 10,
            "thresholds": [6.0],
            "never_run": ["spare"],
            "linears": {"fc": {"rows": 10, "nonfinite_rows": 1}},
            "sha256": "fe6c5e049283637bdebbc2faada91360034b4686ade19a56227c40eae24f6ad1",
        }
        path.write_bytes(safetensors.torch.save(tensors, metadata={"mixq_calibration": json.dumps(facts)}))
        return tensors

    def test_they_load_bit_for_bit_and_are_written_again_byte_for_byte(self, tmp_path: Path) -> None:
        tensors = self.written_by_the_first_release(tmp_path / "old")
        loaded = CalibrationStats.load(tmp_path / "old")
        assert loaded.kinds == ("channels",)
        assert loaded.never_run == ("spare",)
        for name, tensor in tensors.items():
            assert torch.equal(getattr(loaded["fc"], name.removeprefix("fc.")), tensor), name
        loaded.save(tmp_path / "new")
        assert (tmp_path / "new").read_bytes() == (tmp_path / "old").read_bytes()

    def test_an_older_release_refuses_further_kinds_by_their_version(self, tmp_path: Path) -> None:
        calibrate(Attention(), [random_rows(5, 6)], kinds=("gram",)).save(tmp_path / "stats")
        with safe_open(tmp_path / "stats", framework="pt") as file:
            assert json.loads(file.metadata()["mixq_calibration"])["schema_version"] == 2
