"""The published table: shown beside estimates, never mixed into them."""

from __future__ import annotations

import ast
from pathlib import Path

from mixq_compile import area
from mixq_compile.area.comparison import ORDERS, SIZE, compare
from mixq_compile.area.published import CAVEATS, FP16_LUTS, TABLE, published_area


def test_ratios_are_those_of_the_table() -> None:
    assert FP16_LUTS == 6125
    assert published_area("fp16") == 1
    assert published_area("llm_int4") == 21.23
    assert published_area("awq") == published_area("gptq") == 13.99
    assert published_area("lqer_int4") == 1.136
    assert published_area("lqer_mxint4") == 0.325
    assert published_area("llm_int8") is None
    assert {row.relative for row in TABLE if row.scheme is None} == {0.386, 0.451, 0.229}


def test_no_estimate_reads_it() -> None:
    readers = {
        path.name
        for path in Path(area.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and ("published" in str(node.module) or "published" in [alias.name for alias in node.names])
    }
    assert readers == {"comparison.py"}


def test_a_comparison_is_in_the_published_setting_and_says_what_is_different() -> None:
    assert (SIZE.rows, SIZE.in_features, SIZE.out_features, SIZE.outlier_columns) == (1, 4096, 11008, 353)
    data = compare().to_json()
    assert data["published"]["caveats"] == list(CAVEATS)
    assert all(areas["fp16"] == 1 for areas in data["relative"].values())


def test_every_order_survives_wherever_it_is_claimed() -> None:
    found = compare()
    for order in ORDERS[:3]:
        assert all(found.surviving(order).values()), order.claim
        assert len(found.surviving(order)) == 6
    gates = {model: held for order in ORDERS for model, held in found.surviving(order).items()}
    assert all(gates.values())
