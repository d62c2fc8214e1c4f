"""A platform for vLLM that is its CPU platform, but known to Ray: vLLM's Ray executor itself asks for GPUs.

Found by vLLM through the entry point beside it, where this folder is on PYTHONPATH.
"""

from vllm.platforms.cpu import CpuPlatform

# One of the names under which Ray hands out devices; `ray start --resources` says how many a node has.
DEVICE = "HPU"


class CpuNodesPlatform(CpuPlatform):
    """One device of Ray's is one worker."""

    ray_device_key = DEVICE


def platform() -> str:
    """Where the platform is."""
    return "cpu_nodes.CpuNodesPlatform"
