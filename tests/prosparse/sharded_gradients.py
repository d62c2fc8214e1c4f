"""Under torchrun: the regulariser's gradient in FSDP2 (``fully_shard``) against the same model whole,
without and with gradient checkpointing.

python -m torch.distributed.run --nproc-per-node 2 -m tests.prosparse.sharded_gradients
"""

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sparse_backend.prosparse.regulariser import ActivationL1
from tests.prosparse.models import random_llama, random_tokens

WEIGHT = 0.3


def gradients(sharded: bool, recompute: bool, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of loss + λ·L1, two backward passes added up, by parameter."""
    model = random_llama().train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    l1 = ActivationL1(model)
    if sharded:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    for _ in range(2):
        with l1.collecting(penalise=True):
            output = model(input_ids=tokens, labels=tokens, use_cache=False)
        (output.loss + WEIGHT * l1.take_norm()).backward()
    return {
        name: parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        for name, parameter in model.named_parameters()
    }


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    batch = random_tokens(4, 16)
    whole = gradients(False, False, batch)
    # Each process has its share of the batch; FSDP averages over the processes, as a mean over the batch does.
    share = batch.chunk(distributed.get_world_size())[distributed.get_rank()]
    for recompute in (False, True):
        found = gradients(True, recompute, share)
        for name, expected in whole.items():
            where = f"{name}, {'recomputed' if recompute else 'plain'}"
            torch.testing.assert_close(found[name], expected, msg=lambda text, where=where: f"{where}: {text}")
    distributed.barrier()
    if distributed.get_rank() == 0:
        print("gradients agree")
    distributed.destroy_process_group()
