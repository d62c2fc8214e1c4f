"""Runs the kernels on small sizes under compute-sanitizer; fails on any finding. On a GPU machine with the CUDA toolkit:

python3 -m tests.gpu.sanitize [TOOL …]      default: memcheck racecheck synccheck, about two minutes
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from sparse_backend.errors import UserError
from sparse_backend.ffn import native, op
from tests.ffn.layers import ALL_DENSE, ALL_SPARSE, Case
from tests.gpu.device import padding

TOOLS = ("memcheck", "racecheck", "synccheck")
SHAPES = [(8, 8), (24, 40), (520, 1000), (4104, 264), (5120, 136)]
ROWS = (1, 3, 8, 9, 16)
DENSITIES = (0.0, 0.2, 1.0)


def call(dense: bool) -> None:
    """Every kernel, over shapes × rows × densities × dtypes; ``dense``: those around cuBLAS, too."""
    for shape, dtype in itertools.product(SHAPES, (torch.bfloat16, torch.float16)):
        for density in DENSITIES:
            case = Case.random(300, *shape, dtype, density=density, device="cuda")
            for rows in ROWS:
                some = case.first_rows(min(rows, native.max_rows(dtype, shape[0])))
                rows = some.x.shape[0]
                some.run(ALL_SPARSE)
                some.run(ALL_SPARSE, padding(rows, [0]))
                op.gate_values(some.x, some.gate_up, ALL_SPARSE)
            for rows in (1, 33, 300) if dense else ():
                case.first_rows(rows).run(ALL_DENSE)
                case.first_rows(rows).run(ALL_DENSE, padding(rows, [rows - 1]))
    if dense:
        Case.random(33, 24, 40, torch.float32, device="cuda").run(ALL_DENSE)
    torch.cuda.synchronize()


def check(tool: str) -> bool:
    """Run ``call`` in a process of its own under a tool of compute-sanitizer; True if it finds nothing."""
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if sanitizer is None:
        sys.exit("There is no compute-sanitizer: install the CUDA toolkit, or put its bin folder on PATH.")
    # Kernels of torch and cuBLAS are not looked at, nor is what their libraries try out on starting. Without torch's
    # cache each tensor is an allocation of its own, with ends that the tool knows.
    options = ["--tool", tool, "--kernel-name", "kns=prosparse", "--report-api-errors", "no", "--error-exitcode", "9"]
    # cuBLAS' own kernels fail under racecheck, though it is told not to look at them (CUDA 13.0, H200).
    what = "sparse" if tool == "racecheck" else "all"
    started = time.monotonic()
    done = subprocess.run(
        [sanitizer, *options, sys.executable, "-m", "tests.gpu.sanitize", "--call", what],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    print(f"{tool}: exit status {done.returncode}, {time.monotonic() - started:.0f} s", flush=True)
    return done.returncode == 0


def main() -> int:
    """Run the tools named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tools", nargs="*", default=TOOLS, metavar="TOOL", help="memcheck, racecheck, synccheck, initcheck"
    )
    parser.add_argument("--call", choices=("all", "sparse"), help="only call the kernels: what runs under the tool")
    arguments = parser.parse_args()
    try:
        native.require("cuda")  # built here: compiling under a tool would take minutes
    except UserError as error:
        sys.exit(str(error))
    if arguments.call:
        call(dense=arguments.call == "all")
        return 0
    failed = [tool for tool in arguments.tools if not check(tool)]
    print(f"Findings or failures: {', '.join(failed)}." if failed else "Nothing found.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
