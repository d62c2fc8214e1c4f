"""Random layers for the tests of the op."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch

from sparse_backend.ffn import counters, op, reference

ALL_SPARSE = 2**31 - 1
ALL_DENSE = 0
DTYPES = [torch.bfloat16, torch.float32]


@dataclass(frozen=True)
class Case:
    """One call: x [rows, d_model], gate_up [2 * d_ff, d_model], down_t [d_ff, d_model]."""

    x: torch.Tensor
    gate_up: torch.Tensor
    down_t: torch.Tensor
    threshold: float
    drelu: bool = False

    @classmethod
    def random(
        cls,
        rows: int,
        d_model: int,
        d_ff: int,
        dtype: torch.dtype,
        *,
        density: float = 0.2,
        threshold: float = 0.0,
        seed: int = 0,
        device: str = "cpu",
        drelu: bool = False,
        view: float | None = None,
    ) -> "Case":
        """Gate values are normal around a mean that puts the share ``density`` of them above ``threshold``.

        With ``drelu`` the share ``view`` of them, as many as of the up values unless given, and ``density`` of the neurons.
        """
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(rows, d_model, generator=generator, device=device)
        gate_up = torch.randn(2 * d_ff, d_model, generator=generator, device=device) / d_model**0.5
        down_t = torch.randn(d_ff, d_model, generator=generator, device=device) / d_ff**0.5
        x[:, 0] = 1
        shares = [density]
        if drelu:
            first = density**0.5 if view is None else view
            shares = [first, density / first if first else 0.0]
        for half, share in zip(gate_up.chunk(2), shares, strict=False):
            half[:, 0] = threshold + _shift(share)
        return cls(x.to(dtype), gate_up.to(dtype), down_t.to(dtype), threshold, drelu)

    def first_rows(self, rows: int) -> "Case":
        """The same layer with only so many rows of x."""
        return replace(self, x=self.x[:rows])

    def run(self, max_sparse_rows: int, is_padding: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The op's y and the counters of this one call."""
        counted = counters.new_counters(self.x.device, drelu=self.drelu)
        poison(self.x)
        weights = (self.gate_up, self.down_t, self.threshold)
        y = op.sparse_gated_ffn(self.x, *weights, counted, max_sparse_rows, is_padding, self.drelu)
        return y, counted

    def run_row_active(
        self, max_sparse_rows: int, row_active: torch.Tensor, is_padding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``run``; each row's active neurons are added to ``row_active``."""
        counted = counters.new_counters(self.x.device, drelu=self.drelu)
        weights = (self.gate_up, self.down_t, self.threshold)
        y = op.sparse_gated_ffn(
            self.x, *weights, counted, max_sparse_rows, is_padding, self.drelu, row_active=row_active
        )
        return y, counted

    def gates(self, max_sparse_rows: int) -> torch.Tensor:
        """The gate values the op compares."""
        return op.gate_values(self.x, self.gate_up, max_sparse_rows)

    def exchanged(self) -> "Case":
        """The same with gate and up rows in each other's place."""
        return replace(self, gate_up=torch.cat(self.gate_up.chunk(2)[::-1]))

    def views(self, max_sparse_rows: int) -> list[torch.Tensor]:
        """Which gates [rows, d_ff] the op has above the threshold, and with dReLU which up values."""
        values = [self.gates(max_sparse_rows)]
        if self.drelu:
            values.append(op.up_values(self.x, self.gate_up, max_sparse_rows))
        return [reference.active_neurons(of_all, self.threshold) for of_all in values]

    def active(self, max_sparse_rows: int) -> torch.Tensor:
        """Which neurons [rows, d_ff] the op computes as active."""
        views = self.views(max_sparse_rows)
        return views[0] & views[-1]

    def exact(self, active: torch.Tensor) -> torch.Tensor:
        """y in float64, with the given neurons active."""
        gate, up = (self.x.double() @ self.gate_up.double().t()).chunk(2, dim=1)
        return (torch.where(active, gate, 0) * up) @ self.down_t.double()

    def error(self, y: torch.Tensor, active: torch.Tensor) -> float:
        """Largest difference of ``y`` from float64 with the given neurons active.

        Which ones are is taken over: one on the threshold may fall to either side, which is no error of arithmetic.
        """
        return (y.double() - self.exact(active)).abs().max().item()

    def magnitude(self) -> float:
        """The largest sum of absolute values that an output of this layer could be made of."""
        gate, up = (self.x.double().abs() @ self.gate_up.double().abs().t()).chunk(2, dim=1)
        return ((gate * up) @ self.down_t.double().abs()).max().item() if self.x.shape[0] else 0.0

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """y and active neurons of plain PyTorch in the dtype of x."""
        unused = counters.new_counters(self.x.device, drelu=self.drelu)
        y = reference.dense_gated_ffn(self.x, self.gate_up, self.down_t, self.threshold, unused, drelu=self.drelu)
        return y, self.active(ALL_DENSE)


def assert_within_twice(cases: list[Case], max_sparse_rows: int) -> None:
    """The op's largest error over all the cases is at most twice that of plain PyTorch in the same dtype."""
    ours = largest(case.error(case.run(max_sparse_rows)[0], case.active(max_sparse_rows)) for case in cases)
    plain = largest(case.error(*case.dense()) for case in cases)
    if cases[0].x.dtype == torch.float32:
        # Here plain PyTorch is at times exact to the last bit: a few roundings of sums of this size are granted.
        plain += 4 * torch.finfo(torch.float32).eps * max(case.magnitude() for case in cases)
    assert ours <= 2 * plain


def _shift(share: float) -> float:
    far = 50.0
    return NormalDist().inv_cdf(share) if 0 < share < 1 else (-far if share == 0 else far)


def largest(values: Iterable[float]) -> float:
    """The maximum, and NaN if there is one, which ``max`` may pass over."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def poison(like: torch.Tensor) -> None:
    """Leave NaN in the GPU memory that the next tensors of this size will be given, so that an element never written shows."""
    if like.is_cuda:
        given_back = [torch.full((like.nbytes,), 255, dtype=torch.uint8, device=like.device) for _ in range(4)]
        del given_back
