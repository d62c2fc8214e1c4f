"""Where measured tables and compiled kernels are kept between runs."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """``$PROSPARSE_CACHE_DIR``, else ``$XDG_CACHE_HOME/prosparse``, else ``~/.cache/prosparse``. Absolute; need not exist yet."""
    if own := os.environ.get("PROSPARSE_CACHE_DIR"):
        return Path(own).absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "prosparse"
    return Path.home() / ".cache" / "prosparse"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, made if missing, against every other thread and process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
