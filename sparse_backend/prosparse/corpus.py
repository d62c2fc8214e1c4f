"""Text to train and measure on: documents, their split into training and held-out, and their hash.

A corpus is named by a source:

* ``stdlib``: the running Python's standard-library sources, test packages included where they are installed;
* a folder: every text file below it (hidden folders, ``site-packages`` and ``__pycache__`` left out);
* a ``.jsonl`` file: one document a line, an object with ``text`` and, optionally, ``path``;
* any other file: plain text, cut into documents of about 16 KiB at line ends.

The split is by document and depends on the document's path alone, so adding a document moves no other one.
"""

import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sparse_backend.errors import UserError

HELD_OUT_SHARE = 0.02

TEXT_SUFFIXES = frozenset({".c", ".cpp", ".h", ".hpp", ".js", ".md", ".py", ".pyi", ".rs", ".rst", ".ts", ".txt"})
_PLAIN_TEXT_DOCUMENT_BYTES = 16 * 1024


@dataclass(frozen=True)
class Document:
    """One document; ``path`` names it within its corpus and decides on which side of the split it falls."""

    path: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """True for about ``HELD_OUT_SHARE`` of all paths, by SHA-256 of the path."""
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


@dataclass(frozen=True)
class Corpus:
    """Documents in the order of their paths."""

    name: str
    documents: tuple[Document, ...]

    @cached_property
    def training(self) -> list[str]:
        """Texts of the training documents."""
        return [document.text for document in self.documents if not document.is_held_out]

    @cached_property
    def held_out(self) -> list[str]:
        """Texts of the held-out documents."""
        return [document.text for document in self.documents if document.is_held_out]

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 over each document's path, length in UTF-8 bytes and text, in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            text = document.text.encode()
            digest.update(f"{document.path}\0{len(text)}\0".encode())
            digest.update(text)
        return digest.hexdigest()


def read_corpus(source: str, name: str | None = None) -> Corpus:
    """Read every document of ``source`` (see the module's text); documents without any visible character are dropped.

    Args:
        source: ``stdlib``, a folder or a file.
        name: what to call the corpus in manifests; by default the library's version, or the last part of the path.

    Raises:
        UserError: the source does not exist, cannot be read, or leaves one side of the split without a document.
    """
    path = Path(source)
    if source == "stdlib":
        default_name = f"Python {platform.python_version()} standard library"
        found = _stdlib_documents(Path(sysconfig.get_path("stdlib")))
    elif path.is_dir():
        default_name, found = path.resolve().name, _folder_documents(path)
    elif path.is_file():
        default_name, found = path.name, _jsonl_documents(path) if path.suffix == ".jsonl" else _plain_documents(path)
    else:
        raise UserError(
            f"--corpus {source!r} is neither 'stdlib' nor a folder or file on this machine. Give the path of a folder"
            " of text files, of a .jsonl file or of a text file."
        )
    documents = sorted((document for document in found if document.text.strip()), key=lambda document: document.path)
    for document in documents:
        # File names may hold any bytes, and JSON may spell half a surrogate pair.
        try:
            (document.path + document.text).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"--corpus {source!r}: the name or the text of {document.path!r} is not valid Unicode. Rename or mend it, or"
                " leave it out."
            ) from None
    corpus = Corpus(name or default_name, tuple(documents))
    if not documents:
        raise UserError(
            f"--corpus {source!r} holds no text. Folders are searched for {', '.join(sorted(TEXT_SUFFIXES))} files."
        )
    for split, texts in (("training", corpus.training), ("held-out", corpus.held_out)):
        if not texts:
            raise UserError(
                f"--corpus {source!r} has {len(documents)} documents, none of which falls into the {split} split."
                f" The split is by document, {HELD_OUT_SHARE:.0%} held out. Add documents: 200 make this unlikely."
            )
    return corpus


def held_out_documents(source: str) -> list[str]:
    """Texts of a corpus' held-out documents, for measurements on text that training never saw.

    Raises:
        UserError: as ``read_corpus``.
    """
    return read_corpus(source).held_out


def _stdlib_documents(root: Path) -> Iterator[Document]:
    for path in _files_below(root):
        # _sysconfigdata is written when Python is built and holds that machine's paths and compiler flags.
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            # The library's own tests hold files that are broken on purpose.
            try:
                yield Document(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue


def _folder_documents(root: Path) -> Iterator[Document]:
    for path in _files_below(root):
        if path.suffix in TEXT_SUFFIXES:
            yield Document(path.relative_to(root).as_posix(), _read_text(path))


def _files_below(root: Path) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        if path.is_dir():
            if (
                not path.is_symlink()
                and not path.name.startswith(".")
                and path.name not in {"site-packages", "__pycache__"}
            ):
                yield from _files_below(path)
        elif path.is_file():
            yield path


def _jsonl_documents(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"--corpus {path}: line {number} is not JSON ({error}). Each line must be one JSON object."
            ) from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f'--corpus {path}: line {number} has no string "text". Each line must be an object with one.'
            )
        yield Document(str(record.get("path", f"{path.name}:{number}")), text)


def _plain_documents(path: Path) -> Iterator[Document]:
    lines: list[str] = []
    size = count = 0
    for line in _read_text(path).splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= _PLAIN_TEXT_DOCUMENT_BYTES:
            yield Document(f"{path.name}:{count:08d}", "".join(lines))
            lines, size, count = [], 0, count + 1
    yield Document(f"{path.name}:{count:08d}", "".join(lines))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--corpus: {path} is not UTF-8 text ({error}). Convert the file, or leave it out.") from None
    except OSError as error:
        raise UserError(f"--corpus: {path} cannot be read ({error}).") from None
