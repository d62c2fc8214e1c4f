"""`prosparse paths`: up to how many rows the sparse path is faster than the dense one on this machine."""

import argparse
import json
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

from sparse_backend.bench.arguments import check_device, check_dtype, check_shape
from sparse_backend.errors import UserError
from sparse_backend.ffn import native, paths

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default cpu)")
    parser.add_argument("--d-model", type=int, required=True, help="model width, a multiple of 8")
    parser.add_argument("--d-ff", type=int, required=True, help="neurons per layer, a multiple of 8")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the weights (default bfloat16)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--remeasure", action="store_true", help="measure again even where a result is cached")


def run(arguments: argparse.Namespace) -> int:
    """Print the limits, measuring them first where needed."""
    device, dtype, d_model, d_ff = arguments.device, DTYPES[arguments.dtype], arguments.d_model, arguments.d_ff
    check_device(device)
    native.require(device)
    check_shape(d_model, d_ff)
    check_dtype(arguments.dtype, device)
    if paths.largest_sparse_rows(dtype, d_model, device) == 0:
        raise UserError(
            f"There are no sparse kernels for --dtype {arguments.dtype} and --d-model {d_model} on {device}: every number of"
            " rows takes the dense path."
        )
    table = paths.path_table(dtype, d_model, d_ff, device, remeasure=arguments.remeasure)
    if arguments.json:
        rows = [
            {
                "density": density,
                "max_sparse_rows": limit,
                "timings": [asdict(timing) for timing in table.timings[density]],
            }
            for density, limit in sorted(table.limits.items())
        ]
        print(json.dumps(rows, indent=1))
        return 0
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else paths.processor_name(device)
    shown = Table(title=f"{arguments.dtype}, {d_model} x {d_ff}, {native.kernel_info(device).isa}, {where}")
    for column in ("density", "sparse up to rows"):
        shown.add_column(column, justify="right")
    for density, limit in sorted(table.limits.items()):
        shown.add_row(f"{density:g}", str(limit))
    Console().print(shown)
    return 0
