"""Gathers text for the control runs: one Parquet file a domain (columns ``path`` and ``text``), from folders of this machine.

    python deploy/controls/corpus.py OUT DOMAIN=MEGABYTES:SUFFIXES:FOLDER[,FOLDER...] ...
    python deploy/controls/corpus.py texts python=36:.py:/usr/lib/python3 cpp=26:.h,.hpp:/usr/include

Within a domain a text is taken once, and files in the order of a hash of their path, until it has its megabytes. Left out are
files that are short, long, generated (long lines) or not mostly ASCII. ``.gz`` and ``.dz`` files are read as what they compress;
text without line structure of its own (``.dict``) is cut at blank lines.
"""

import gzip
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

_LENGTH = range(400, 300_000)
_LONGEST_MEAN_LINE = 160
_ASCII_SHARE = 0.95
_ENTRY_BYTES = 16 * 1024


def texts(path: Path) -> Iterator[str]:
    """The documents in one file; none where it is not UTF-8."""
    content = gzip.decompress(path.read_bytes()) if path.suffix in {".gz", ".dz"} else path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return
    if ".dict" not in path.suffixes:
        yield text
        return
    document = ""
    for paragraph in text.split("\n\n"):
        document += paragraph + "\n\n"
        if len(document) >= _ENTRY_BYTES:
            yield document
            document = ""


def is_wanted(text: str) -> bool:
    """False for text that somebody is unlikely to have written."""
    lines = text.count("\n") + 1
    ascii_characters = len(text.encode("ascii", "ignore"))
    return (
        len(text) in _LENGTH and len(text) / lines < _LONGEST_MEAN_LINE and ascii_characters >= _ASCII_SHARE * len(text)
    )


def documents(folders: list[Path], suffixes: tuple[str, ...], limit: float) -> Iterator[tuple[str, str]]:
    """(path, text) of one domain, up to ``limit`` bytes; paths are relative to the folder's parent."""
    files = {
        path.relative_to(folder.parent).as_posix(): path
        for folder in folders
        for path in folder.rglob("*")
        if path.name.endswith(suffixes) and path.is_file() and not path.is_symlink()
    }
    seen: set[bytes] = set()
    size = 0
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        for index, text in enumerate(texts(files[name])):
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen or not is_wanted(text):
                continue
            seen.add(digest)
            size += len(text)
            if size > limit:
                return
            yield f"{name}:{index:05d}" if index else name, text


def main() -> None:
    """Write the domains named on the command line."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True)
    for argument in sys.argv[2:]:
        name, _, rest = argument.partition("=")
        megabytes, suffixes, folders = rest.split(":", 2)
        found = sorted(
            documents([Path(f) for f in folders.split(",")], tuple(suffixes.split(",")), 1e6 * float(megabytes))
        )
        table = pyarrow.table({"path": [path for path, _ in found], "text": [text for _, text in found]})
        parquet.write_table(
            table,
            out / f"{name}.parquet",
            compression="zstd",
            compression_level=19,
            use_dictionary=False,
            data_page_size=64 * 2**20,
        )
        print(
            f"{name}: {len(found)} documents, {sum(len(text) for _, text in found) / 1e6:.1f} MB,"
            f" {(out / f'{name}.parquet').stat().st_size / 2**20:.1f} MiB compressed"
        )


if __name__ == "__main__":
    main()
