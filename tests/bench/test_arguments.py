import argparse

import pytest

from sparse_backend.bench.arguments import positive_int, positive_ints


def test_reads_a_list() -> None:
    assert positive_ints("1,2,16") == [1, 2, 16]


@pytest.mark.parametrize("text", ["", "1,,2", "a", "0,1", "1.5", "-3"])
def test_refuses_what_is_no_list_of_positive_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"whole numbers|below 1"):
        positive_ints(text)


def test_reads_a_positive_number() -> None:
    assert positive_int("7") == 7


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "a"])
def test_refuses_what_is_no_positive_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"whole number|below 1"):
        positive_int(text)
