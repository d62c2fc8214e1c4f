"""What the GPU tests share: when they run, their paths and dtypes, patterns of activity."""

import pytest
import torch

from sparse_backend.ffn.counters import DENSE, SPARSE
from tests.ffn.layers import ALL_DENSE, ALL_SPARSE

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

both_paths = pytest.mark.parametrize("path", [ALL_SPARSE, ALL_DENSE], ids=["sparse", "dense"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def index_of(path: int) -> int:
    """The counters' first index for a value of ``max_sparse_rows``."""
    return SPARSE if path == ALL_SPARSE else DENSE


def padding(rows: int, padded: list[int]) -> torch.Tensor:
    """is_padding, True at the given rows."""
    is_padding = torch.zeros(rows, dtype=torch.bool, device="cuda")
    is_padding[padded] = True
    return is_padding
