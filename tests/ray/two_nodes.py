"""A tiny checkpoint on two Ray nodes of this machine, one tensor-parallel rank each, compared with one process.

python -m tests.ray.two_nodes        needs `pip install ray`; not part of `make test`
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PORT = 26379
NODES = 2
DEVICE = "HPU"  # as in cpu_nodes.py
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


def ray(*arguments: str) -> list[str]:
    """A command of Ray's."""
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


@contextlib.contextmanager
def nodes() -> Iterator[None]:
    """The Ray nodes, with one device each, while the block runs."""
    address = f"--address=127.0.0.1:{PORT}"
    node = ("--block", "--num-cpus=1", f'--resources={{"{DEVICE}": 1}}')
    with contextlib.ExitStack() as running:
        for where in (("--head", f"--port={PORT}", "--include-dashboard=false"), *[(address,)] * (NODES - 1)):
            process = subprocess.Popen(
                ray("start", *where, *node),
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            running.callback(os.killpg, process.pid, signal.SIGTERM)
            while subprocess.run(ray("health-check", address), check=False, capture_output=True).returncode:
                time.sleep(0.5)
        os.environ["RAY_ADDRESS"] = f"127.0.0.1:{PORT}"
        yield


def serve(folder: str, options: dict[str, object]) -> tuple[list[list[int]], list[dict[str, int]]]:
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
    print(f"neurons of layer 0 by worker: {[worker['layers'][0]['d_ff'] for worker in workers]}")
    # Which rows come together in a step, and so steps and unions, is a matter of time.
    counted = [
        {"neurons": layer["d_ff"], **{kind: layer["paths"]["sparse"][kind] for kind in ("rows", "active")}}
        for layer in merge(workers)["layers"]
    ]
    return [list(output.outputs[0].token_ids) for output in outputs], counted


def main() -> int:
    """Start the nodes, compare, stop them; returns the exit status."""
    from tests import families

    with tempfile.TemporaryDirectory() as root:
        folder = f"{root}/model"
        families.write(Path(folder), "relu-llama")
        expected = serve(folder, {"enforce_eager": True})
        with nodes():
            over_ray = {"tensor_parallel_size": NODES, "distributed_executor_backend": "ray"}
            found = serve(folder, {"enforce_eager": True, **over_ray})
    for what, ours, one in zip(("tokens", "counters"), found, expected, strict=True):
        print(f"{what}: {'the same' if ours == one else f'{ours}, but {one} in one process'}; {one}")
    return int(found != expected)


if __name__ == "__main__":
    sys.exit(main())
