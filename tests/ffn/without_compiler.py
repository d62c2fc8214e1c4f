import subprocess
import sys
from pathlib import Path


def run_without_compiler(script: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python script that finds no compiler and no library built before; it must succeed."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": "", "PROSPARSE_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
