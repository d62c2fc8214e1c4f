"""Made-up source files to train on in tests: small, the same everywhere, and with structure a tiny model can learn."""

import json
import random
from pathlib import Path

_NAMES = ("count", "total", "value", "index", "name", "first", "second", "result", "limit", "items")
_OPERATORS = ("+", "-", "*", "//", "%")


def write_corpus(path: Path, documents: int = 240) -> Path:
    """Write a .jsonl corpus of small Python modules; with the default size a few fall into the held-out split."""
    generator = random.Random(0)
    with path.open("w") as file:
        for number in range(documents):
            file.write(json.dumps({"path": f"package/module_{number}.py", "text": _module(generator)}) + "\n")
    return path


def _module(generator: random.Random) -> str:
    functions = []
    for _ in range(generator.randrange(3, 9)):
        first, second, result = generator.sample(_NAMES, 3)
        operator = generator.choice(_OPERATORS)
        functions.append(
            f"def compute_{result}({first}, {second}):\n"
            f'    """Return the {result} of {first} and {second}."""\n'
            f"    if {first} > {generator.randrange(100)}:\n"
            f"        return {first} {operator} {second}\n"
            f"    return {second}\n"
        )
    return "\n\n".join(functions)
