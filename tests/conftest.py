"""Every test runs offline, and no test class is silently empty."""

import os
from collections.abc import Generator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    # pytest passes over a class whose methods are misnamed, or which has an __init__, with a warning at most.
    report = yield
    if isinstance(collector, pytest.Class) and report.passed and not report.result:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} is named like a test class, but no test was collected from it"
    return report
