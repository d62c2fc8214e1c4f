"""Finding a model's gated feed-forward layers and observing what goes through them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


def gated_ffns(model: nn.Module) -> list[nn.Module]:
    """The modules with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``, from the first layer to the last."""
    return [
        module
        for module in model.modules()
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    ]


@contextmanager
def watching(model: nn.Module, part: str, observe: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``observe(layer, x)`` with the input of ``part`` of every gated feed-forward layer while the block runs.

    The input of ``down_proj`` is x1 = act(gate)*up, the input of ``act_fn`` the gate: both [..., d_ff]. Works for any
    gated feed-forward implementation, since nothing of its forward is replaced.
    """
    with ExitStack() as stack:
        for layer, ffn in enumerate(gated_ffns(model)):

            def hook(_module: nn.Module, inputs: tuple[Tensor, ...], layer: int = layer) -> None:
                observe(layer, inputs[0])

            handle = getattr(ffn, part).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield
