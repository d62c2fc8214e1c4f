import argparse

import pytest

from sparse_backend.bench.arguments import row_counts


def test_reads_a_list() -> None:
    assert row_counts("1,2,16") == [1, 2, 16]


@pytest.mark.parametrize("text", ["", "1,,2", "a", "0,1", "1.5", "-3"])
def test_refuses_what_is_no_list_of_positive_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"whole numbers|below 1"):
        row_counts(text)
