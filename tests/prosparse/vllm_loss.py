"""The mean next-token loss that vLLM gives on blocks of tokens: ``python -m tests.prosparse.vllm_loss FOLDER BLOCKS DTYPE``.

BLOCKS is a file with a JSON list of lists of token ids. Prints the loss in nats.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # One token is generated behind each block, and thrown away.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    from vllm import LLM, SamplingParams

    from sparse_backend.checkpoint import Checkpoint

    folder, blocks, dtype = sys.argv[1:]
    prompts = json.loads(Path(blocks).read_text())
    llm = LLM(
        model=folder,
        dtype=dtype,
        enforce_eager=True,
        hf_overrides={"architectures": [Checkpoint.open(folder).model_class]},
        worker_extension_cls="sparse_backend.vllm_plugin.worker.SparsityWorkerExtension",
        max_model_len=len(prompts[0]) + 1,
        max_num_seqs=8,
        kv_cache_memory_bytes=64 << 20,
        enable_prefix_caching=False,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    losses = [
        -entry[token].logprob
        for prompt, output in zip(prompts, outputs, strict=True)
        for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    ]
    print(f"loss {sum(losses) / len(losses):.6f}")
