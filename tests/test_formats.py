"""Number formats: texts that round-trip, shapes and bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixq_compile.errors import OptionError
from mixq_compile.formats import INT4, INT8, TensorFormat


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8", TensorFormat(8)),
        ("int4/128", TensorFormat(4, group=128)),
        ("uint4/64", TensorFormat(4, group=64, signed=False)),
        ("uint8", TensorFormat(8, signed=False)),
        ("mxint2/16", TensorFormat(2, group=16, scale="power_of_two")),
    ],
)
def test_texts(text: str, expected: TensorFormat) -> None:
    assert TensorFormat.parse(text) == expected
    assert str(expected) == text


@given(
    st.builds(
        TensorFormat,
        bits=st.sampled_from([2, 4, 8]),
        group=st.integers(1, 4096),
        signed=st.booleans(),
    )
)
def test_every_format_is_its_text(format: TensorFormat) -> None:
    assert TensorFormat.parse(str(format)) == format


@pytest.mark.parametrize("text", ["int3", "int4/0", "float8", "int8 ", "int4/", "umxint4/16", "mxint4", ""])
def test_other_texts_are_refused_with_examples(text: str) -> None:
    with pytest.raises(OptionError, match="int4/128"):
        TensorFormat.parse(text)


def test_a_shared_exponent_needs_groups_and_a_sign() -> None:
    with pytest.raises(OptionError, match="signed and in groups"):
        TensorFormat(4, group=16, signed=False, scale="power_of_two")


def test_largest_codes() -> None:
    assert [TensorFormat.parse(text).largest_code for text in ("int8", "int4", "uint4", "mxint2/16")] == [
        127, 7, 15, 1,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "codes", "scales", "bytes_of_all"),
    [
        ("int8", (3, 45), (3,), 3 * 45 + 3 * 4),
        ("int4", (3, 23), (3,), 3 * 23 + 3 * 4),
        ("int4/16", (3, 23), (3, 3), 3 * 23 + 9 * 4),
        ("uint4/16", (3, 23), (3, 3), 3 * 23 + 9 * 5),
        ("mxint2/16", (3, 12), (3, 3), 3 * 12 + 9),
    ],
)
def test_shapes_and_bytes_of_a_matrix(
    text: str, codes: tuple[int, int], scales: tuple[int, ...], bytes_of_all: int
) -> None:
    format = TensorFormat.parse(text)
    assert format.codes_shape(3, 45) == codes
    assert format.scale_shape(3, 45) == scales
    assert format.nbytes(3, 45) == bytes_of_all


def test_what_integer_kernels_multiply() -> None:
    assert INT8.per_row
    assert INT4.per_row
    assert not any(TensorFormat.parse(text).per_row for text in ("int4/128", "uint8", "mxint4/16"))
