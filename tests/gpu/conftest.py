import pytest
import torch

from sparse_backend.ffn import native


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Everything here tests the kernels, not the reference; they are built before a test captures a graph."""
    if torch.cuda.is_available():
        assert native.load("cuda"), native.kernel_info("cuda").reason
