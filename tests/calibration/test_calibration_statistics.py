"""`CalibrationStats`: columns, names, the check against a model, and the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mixq_compile.calibration import CalibrationStats, LinearStatistics, statistics_file
from mixq_compile.errors import OptionError, StatisticsError


def linear(fqn: str, absmax: list[float]) -> LinearStatistics:
    values = torch.tensor(absmax)
    return LinearStatistics(
        fqn=fqn,
        absmax=values,
        mean_magnitude=values / 2,
        mean_square=values.square() / 3,
        rows=10,
        nonfinite_rows=1,
        rows_above=(values > 6).long()[None] * 4,
    )


def statistics(never_run: tuple[str, ...] = (), **absmax: list[float]) -> CalibrationStats:
    """Statistics of the named linears; `__` stands for a dot."""
    names = {name.replace("__", "."): values for name, values in absmax.items()}
    return CalibrationStats(
        linears={name: linear(name, values) for name, values in names.items()},
        never_run=never_run,
        thresholds=(6.0,),
        model_class="tests.Model",
        dtype="float32",
        package_version="0.1.0",
    )


class TestOutlierColumns:
    stats = statistics(fc=[1.0, 9.0, 6.0, 7.0, 9.0, 0.0, 6.5, 2.0])

    def test_by_default_columns_above_the_calibrated_threshold(self) -> None:
        assert self.stats.outlier_columns("fc") == [1, 3, 4, 6]

    def test_a_column_exactly_at_the_threshold_is_none(self) -> None:
        assert self.stats.outlier_columns("fc", threshold=7.0) == [1, 4]

    def test_the_largest_of_a_count_ascending(self) -> None:
        assert self.stats.outlier_columns("fc", count=3) == [1, 3, 4]

    def test_of_equal_columns_the_lowest_is_taken(self) -> None:
        assert self.stats.outlier_columns("fc", count=1) == [1]

    def test_a_count_beyond_the_channels_takes_all(self) -> None:
        assert self.stats.outlier_columns("fc", count=100) == list(range(8))

    def test_threshold_and_count_together_take_the_largest_above_it(self) -> None:
        assert self.stats.outlier_columns("fc", threshold=6.0, count=2) == [1, 4]
        assert self.stats.outlier_columns("fc", threshold=6.0, count=8) == [1, 3, 4, 6]

    def test_limit_share_keeps_the_largest(self) -> None:
        assert self.stats.outlier_columns("fc", limit_share=0.25) == [1, 4]
        assert self.stats.outlier_columns("fc", count=5, limit_share=0.25) == [1, 4]

    def test_limit_share_rounds_down(self) -> None:
        assert len(statistics(fc=[1.0] * 172).outlier_columns("fc", count=128, limit_share=0.25)) == 43
        assert len(statistics(fc=[1.0] * 100).outlier_columns("fc", count=128, limit_share=0.29)) == 29

    def test_none(self) -> None:
        assert self.stats.outlier_columns("fc", threshold=math.inf) == []
        assert self.stats.outlier_columns("fc", count=0) == []

    @pytest.mark.parametrize(
        "options",
        [
            {"threshold": 0.0},
            {"threshold": math.nan},
            {"count": -1},
            {"limit_share": 0.0},
            {"limit_share": 1.1},
        ],
    )
    def test_numbers_out_of_range_are_refused(self, options: dict[str, float]) -> None:
        with pytest.raises(OptionError, match=next(iter(options))):
            self.stats.outlier_columns("fc", **options)  # type: ignore[arg-type]

    def test_an_unknown_linear_is_named_with_a_few_known_ones(self) -> None:
        with pytest.raises(StatisticsError, match=r"'other'.*'fc'"):
            self.stats.outlier_columns("other")

    @given(
        absmax=st.lists(st.floats(0, 20, width=32), min_size=1, max_size=40),
        threshold=st.floats(0.5, 15, width=32),
        count=st.integers(0, 50),
        share=st.floats(0.01, 1),
    )
    def test_chosen_columns_are_at_least_as_large_as_those_left_out(
        self, absmax: list[float], threshold: float, count: int, share: float
    ) -> None:
        stats = statistics(fc=absmax)
        chosen = stats.outlier_columns("fc", threshold, count, share)
        above = [column for column, value in enumerate(absmax) if value > threshold]
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(above)
        assert len(chosen) == min(len(above), count, math.floor(share * len(absmax) + 1e-9))
        left_out = set(above) - set(chosen)
        assert all(absmax[one] >= absmax[other] for one in chosen for other in left_out)


class TestNames:
    def test_an_exact_name_wins_over_a_suffix(self) -> None:
        stats = statistics(fc=[1.0], model__fc=[2.0])
        assert stats["fc"].absmax.item() == 1.0
        assert stats["model.fc"].absmax.item() == 2.0

    @pytest.mark.parametrize("name", ["model.layers.0.fc", "model.model.layers.0.fc", "layers.0.fc"])
    def test_a_linear_is_found_under_longer_and_shorter_prefixes(self, name: str) -> None:
        stats = statistics(model__layers__0__fc=[1.0], model__layers__1__fc=[2.0])
        assert stats[name].absmax.item() == 1.0
        assert name in stats

    def test_the_longest_suffix_wins(self) -> None:
        stats = statistics(fc=[1.0], block__fc=[2.0])
        assert stats["model.block.fc"].absmax.item() == 2.0

    def test_a_suffix_begins_after_a_dot(self) -> None:
        assert statistics(fc=[1.0]).find("xfc") is None

    def test_names_that_only_end_alike_do_not_match(self) -> None:
        assert statistics(encoder__layers__0__fc=[1.0]).find("decoder.layers.0.fc") is None

    def test_an_ambiguous_name_is_an_error_that_lists_the_candidates(self) -> None:
        stats = statistics(layers__0__fc=[1.0], layers__1__fc=[2.0])
        with pytest.raises(StatisticsError, match=r"ambiguous.*layers\.0\.fc.*layers\.1\.fc"):
            stats.find("fc")

    def test_a_linear_that_never_ran_does_not_take_another_one_s_statistics(self) -> None:
        stats = statistics(never_run=("model.fc",), fc=[1.0])
        assert stats.find("model.fc") is None


class TestCheckModel:
    stats = statistics(never_run=("spare",), model__a=[1.0, 2.0], model__b=[3.0])

    def test_the_calibrated_model_passes(self) -> None:
        assert self.stats.check_model({"model.a": (5, 2), "model.b": (7, 1)}) == ()

    def test_the_number_of_channels_alone_will_do(self) -> None:
        assert self.stats.check_model({"model.a": 2, "model.b": 1}) == ()

    def test_pairs_a_wrapper_s_prefix_and_a_part_of_the_model_pass(self) -> None:
        assert self.stats.check_model([("wrapper.model.a", (5, 2))]) == ()

    def test_a_linear_that_never_ran_passes_with_a_note(self) -> None:
        notes = self.stats.check_model({"model.a": (5, 2), "spare": (4, 4)})
        assert notes == ("spare never ran during calibration and has no statistics",)

    def test_another_number_of_channels_is_refused(self) -> None:
        with pytest.raises(StatisticsError, match=r"model\.a: K is 3, calibrated with 2"):
            self.stats.check_model({"model.a": (5, 3)})

    def test_an_unknown_linear_is_refused(self) -> None:
        with pytest.raises(StatisticsError, match=r"belong to another model.*other: not among"):
            self.stats.check_model({"model.a": (5, 2), "other": (5, 2)})

    def test_two_linears_may_not_share_one_entry_by_their_suffix(self) -> None:
        with pytest.raises(StatisticsError, match=r"shares the calibrated name 'model\.a'"):
            self.stats.check_model({"x.model.a": (5, 2), "y.model.a": (5, 2)})

    def test_at_most_five_linears_are_named(self) -> None:
        with pytest.raises(StatisticsError) as caught:
            self.stats.check_model({f"unknown{number}": (5, 2) for number in range(9)})
        assert str(caught.value).count("not among") == 5
        assert "and 4 more" in str(caught.value)


class TestHash:
    def test_it_is_the_same_in_every_release(self) -> None:
        expected = "aa7cf40767f217d0fecfe38e855d87e1a0b9a520ed10422bebd1262af6585ecd"
        assert statistics(fc=[1.0, 8.0]).sha256() == expected

    def test_the_order_of_linears_does_not_matter(self) -> None:
        assert statistics(a=[1.0], b=[2.0]).sha256() == statistics(b=[2.0], a=[1.0]).sha256()

    def test_numbers_and_names_matter(self) -> None:
        hashes = {
            statistics(a=[1.0]).sha256(),
            statistics(a=[1.5]).sha256(),
            statistics(b=[1.0]).sha256(),
            statistics(never_run=("c",), a=[1.0]).sha256(),
        }
        assert len(hashes) == 4


class TestFile:
    stats = statistics(never_run=("spare",), model__a=[1.0, 2.0], model__b=[math.pi])

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "stats.safetensors"
        self.stats.save(path)
        return path

    def test_what_is_loaded_equals_what_was_saved(self, path: Path) -> None:
        loaded = CalibrationStats.load(path)
        assert loaded.sha256() == self.stats.sha256()
        for name in ("never_run", "thresholds", "model_class", "dtype", "package_version", "total_rows"):
            assert getattr(loaded, name) == getattr(self.stats, name)
        entry = loaded["model.b"]
        assert (entry.fqn, entry.rows, entry.nonfinite_rows) == ("model.b", 10, 1)
        assert torch.equal(entry.absmax, self.stats["model.b"].absmax)

    def test_it_is_one_safetensors_file_that_describes_itself(self, path: Path) -> None:
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["mixq_calibration"])
        assert facts["schema_version"] == 1
        assert facts["model_class"] == "tests.Model"
        assert facts["total_rows"] == 10

    def test_a_failed_write_leaves_the_old_file_and_no_other(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(StatisticsError, match=r"cannot write.*No space left"):
            statistics(a=[9.0]).save(path)
        assert CalibrationStats.load(path).sha256() == self.stats.sha256()
        assert list(path.parent.iterdir()) == [path]

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(StatisticsError, match="nowhere"):
            self.stats.save(tmp_path / "nowhere" / "stats.safetensors")

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(StatisticsError, match="No such file"):
            CalibrationStats.load(tmp_path / "absent")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(StatisticsError, match="cannot read"):
            CalibrationStats.load(tmp_path)

    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_a_file_cut_short(self, path: Path, kept: int) -> None:
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(StatisticsError, match=r"stats.safetensors: it is damaged, cut short"):
            CalibrationStats.load(path)

    def test_a_changed_number(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
        with pytest.raises(StatisticsError, match="sha256"):
            CalibrationStats.load(path)

    def test_bytes_of_something_else(self, path: Path) -> None:
        path.write_bytes(b"not a safetensors file at all" * 10)
        with pytest.raises(StatisticsError, match="no safetensors file"):
            CalibrationStats.load(path)

    def test_a_safetensors_file_of_something_else(self, path: Path) -> None:
        safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
        with pytest.raises(StatisticsError, match="without calibration statistics"):
            CalibrationStats.load(path)

    @pytest.mark.parametrize(
        ("header", "why"),
        [
            ('{"schema_version": 3}', "schema version 3, and this release reads version 1 and 2"),
            ('{"schema_version": 1}', "damaged: KeyError 'linears'"),
            ('{"schema_version": 1, "linears": {"a": {"rows": 1}}}', "damaged: KeyError 'a.absmax'"),
            ('{"schema_version": 1, "linears": []}', "damaged"),
            ("[]", "schema version None"),
            ("{", "header is damaged"),
        ],
    )
    def test_a_header_that_cannot_be_read(self, path: Path, header: str, why: str) -> None:
        metadata = {statistics_file.METADATA_KEY: header}
        safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(StatisticsError, match=why):
            CalibrationStats.load(path)
