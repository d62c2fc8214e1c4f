"""What the L1 norm costs: training steps with and without it, side by side on one model; prints JSON.

    python deploy/controls/step_cost.py                       # 91 M parameters, the control runs' shape
    python deploy/controls/step_cost.py --compile
    python deploy/controls/step_cost.py --d-model 4096 --d-ff 11008 --layers 4 --heads 32 --batch 8 --context 2048

A step is what the trainer's is on a GPU: bfloat16 autocast over float32 weights, loss, backward pass, clipped gradient,
fused AdamW. Steps come in pairs, whose first is with the norm in every other one. ``cost`` is the median of the pairs' ratios;
where its quartiles are not of one mind, the machine was too busy to tell.
"""

import argparse
import json
from statistics import median, quantiles
from time import perf_counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_backend.prosparse.regulariser import ActivationL1

_WARM_UP = 5
_WEIGHT = 2e-5


def main() -> None:
    """Time both kinds of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"d-model": 768, "d-ff": 2048, "layers": 12, "heads": 12, "vocabulary": 8192, "context": 512, "batch": 64}
    for name, default in shape.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=30, help="steps of each kind that are timed (30)")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.d_model,
        intermediate_size=args.d_ff,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        hidden_act="relu",
    )
    model = LlamaForCausalLM(config).to(args.device).train()
    l1 = ActivationL1(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward = torch.compile(model) if args.compile else model
    tokens = torch.randint(args.vocabulary, (args.batch, args.context), device=args.device)

    def step(penalise: bool) -> None:
        with torch.autocast(args.device, torch.bfloat16), l1.collecting(penalise):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        if penalise:
            loss = loss + _WEIGHT * l1.take_norm()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def milliseconds(penalise: bool) -> float:
        started = perf_counter()
        step(penalise)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (perf_counter() - started)

    for _ in range(_WARM_UP):
        for penalise in (False, True):
            milliseconds(penalise)
    pairs = []
    for number in range(args.rounds):
        kinds = (False, True) if number % 2 else (True, False)
        timed = {penalise: milliseconds(penalise) for penalise in kinds}
        pairs.append((timed[False], timed[True]))
    without, penalised = (median(times) for times in zip(*pairs, strict=True))
    low, middle, high = (quartile - 1 for quartile in quantiles((after / before for before, after in pairs), n=4))
    result = vars(args) | {
        "device_name": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "parameters": model.num_parameters(),
        "step_ms": round(without, 3),
        "step_ms_with_l1": round(penalised, 3),
        "cost": round(middle, 4),
        "cost_quartiles": [round(low, 4), round(high, 4)],
        "tokens_per_second": round(1000 * tokens.numel() / penalised),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
