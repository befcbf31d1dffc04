"""Calibration: run a model over sample batches and keep what its linears saw."""

from mixq_compile.calibration.collector import calibrate, linear_shapes
from mixq_compile.calibration.linear_statistics import LinearStatistics
from mixq_compile.calibration.statistics import CalibrationStats

__all__ = ["CalibrationStats", "LinearStatistics", "calibrate", "linear_shapes"]
