"""4-bit activations without statistics warn at every entrance, and with them at none."""

from __future__ import annotations

import warnings

import pytest
from compiling import block, compiled, rows

import mixq_compile as mixq

MESSAGE = "quantizes activations to 4 bit, and no stats were given"


def enter(entrance: str, **options: object) -> None:
    model = block()
    if entrance == "backend":
        compiled(model, **options)(rows())
    elif entrance == "quantize":
        mixq.quantize(model, keep_originals=True, **options)
    else:
        mixq.compile(mixq.capture(model, (rows(),)), release_weights=False, force=True, **options)


ENTRANCES = pytest.mark.parametrize("entrance", ["backend", "quantize", "export"])


@ENTRANCES
@pytest.mark.parametrize("options", [{"scheme": "w4a4o16"}, {"layers": {"up_proj": "w4a4o16"}}], ids=str)
def test_without_statistics_it_warns(entrance, options):
    with pytest.warns(UserWarning, match=MESSAGE):
        enter(entrance, **options)


@ENTRANCES
def test_with_statistics_or_other_schemes_it_does_not(entrance):
    stats = mixq.calibrate(block(), [rows()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{MESSAGE}")
        enter(entrance, scheme="w4a4o16", stats=stats)
        enter(entrance, scheme="w4a8o16")
