"""A worker extension for the tests of vLLM on a GPU."""

from typing import Any

from sparse_backend.vllm_plugin.worker import SparsityWorkerExtension


class FactsWorkerExtension(SparsityWorkerExtension):
    """Also tells how the worker came to run, which vLLM decides late and changes silently."""

    def facts(self) -> dict[str, Any]:
        """Which runner, CUDA graphs and attention are in use."""
        runner = self.model_runner
        groups = [group for groups in runner.attn_groups for group in groups]
        return {
            "runner": type(runner).__module__,
            "graphs": runner.compilation_config.cudagraph_mode.name,
            "attention": sorted({group.backend.get_name() for group in groups}),
        }
