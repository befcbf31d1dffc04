"""Every test runs offline, no test class is silently empty, and what was skipped is said in one line."""

import os
from collections.abc import Generator
from typing import Any

import pytest
from skipped import skipped_for

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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = terminalreporter.stats.get("skipped", ())
    reasons = (report.longrepr[2] if isinstance(report.longrepr, tuple) else "" for report in reports)
    line = skipped_for(reasons)
    if line:
        terminalreporter.write_line(line)
