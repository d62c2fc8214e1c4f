from collections.abc import Iterator

import pytest
import torch

from sparse_backend.ffn import native

ISAS = native.available_isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that this machine has."""
    before = native.kernel_info().isa
    native.select_isa(request.param)
    yield request.param
    native.select_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
