"""Where measured tables and compiled kernels are kept between runs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$PROSPARSE_CACHE_DIR``, else ``$XDG_CACHE_HOME/prosparse``, else ``~/.cache/prosparse``. It need not exist yet."""
    if own := os.environ.get("PROSPARSE_CACHE_DIR"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "prosparse"
    return Path.home() / ".cache" / "prosparse"
