"""Environment variables for a while: what is imported or started inside reads them, nothing after it does."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def defaults_in_environment(defaults: dict[str, str]) -> Iterator[None]:
    """Set the variables that are not set yet; take them out again at the end."""
    missing = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
