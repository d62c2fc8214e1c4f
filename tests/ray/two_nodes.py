"""Serve a tiny checkpoint from two Ray nodes of this machine, and compare text and counters with one process.

python -m tests.ray.two_nodes        needs `pip install ray`; not part of `make test`

Each node holds one of two pipeline stages or tensor-parallel ranks.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PORT = 26379
NODES = 2
# Here and in every process started from here vLLM finds the platform beside this file.
sys.path.insert(0, str(FOLDER))
os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH", "")])
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def ray(*arguments: str) -> None:
    """One command of Ray's."""
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *arguments], check=True, stdout=subprocess.DEVNULL)


def serve(folder: str, options: dict[str, object]) -> tuple[list[list[int]], list[dict[str, object]]]:
    """Greedy tokens of three prompts, and what the counters say of each layer."""
    from vllm import LLM, SamplingParams

    from sparse_backend.checkpoint import Checkpoint
    from sparse_backend.vllm_plugin.snapshot import merge

    llm = LLM(
        model=folder,
        dtype="float32",
        hf_overrides={"architectures": [Checkpoint.open(folder).model_class]},
        additional_config={"prosparse": {"ffn_path": "sparse"}},
        worker_extension_cls="sparse_backend.vllm_plugin.worker.SparsityWorkerExtension",
        kv_cache_memory_bytes=32 << 20,
        max_num_seqs=8,
        **options,
    )
    llm.collective_rpc("sparsity_reset")
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in ([5, 6, 7, 8], [40, 41, 42], [200, 12] * 12)],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    workers = llm.collective_rpc("sparsity_snapshot")
    print(f"{len(workers)} workers, layers {[[layer['layer'] for layer in worker['layers']] for worker in workers]}")
    return [list(output.outputs[0].token_ids) for output in outputs], merge(workers)["layers"]


def main() -> None:
    """Start the nodes, compare, stop them."""
    from tests import families

    with tempfile.TemporaryDirectory() as root:
        folder = f"{root}/model"
        families.write(Path(folder), "relu-llama")
        expected = serve(folder, {"enforce_eager": True})
        ray("start", "--head", f"--port={PORT}", "--num-cpus=1", '--resources={"HPU": 1}', "--include-dashboard=false")
        try:
            for _ in range(NODES - 1):
                ray("start", f"--address=127.0.0.1:{PORT}", "--num-cpus=1", '--resources={"HPU": 1}')
            os.environ["RAY_ADDRESS"] = f"127.0.0.1:{PORT}"
            found = serve(
                folder, {"tensor_parallel_size": 2, "enforce_eager": True, "distributed_executor_backend": "ray"}
            )
        finally:
            ray("stop", "--force")
    print("tokens", "the same" if found[0] == expected[0] else f"differ: {found[0]} {expected[0]}")
    print("counters", "the same" if found[1] == expected[1] else f"differ: {found[1]} {expected[1]}")


if __name__ == "__main__":
    main()
