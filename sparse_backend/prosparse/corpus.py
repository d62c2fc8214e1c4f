"""Text to train and measure on: sources of documents, their split into training and held-out, and their hash.

A source is named by

* ``stdlib``: the running Python's standard-library sources, test packages included where they are installed;
* a folder: every text, ``.jsonl`` and ``.parquet`` file below it, but for hidden folders, ``site-packages`` and
  ``__pycache__``;
* a ``.jsonl`` file: one document a line, an object with ``text`` and, optionally, ``path``;
* a ``.parquet`` file: one document a row, with the same two names for its columns;
* any other file: plain text, cut into documents of about 16 KiB at line ends.

The split is by document and depends on the document's path alone, so adding a document or a source moves no other one.
"""

import hashlib
import json
import platform
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sparse_backend.errors import UserError
from sparse_backend.prosparse.recipe import STANDARD_LIBRARY, Data, Source

HELD_OUT_SHARE = Data.model_fields["held_out"].default

TEXT_SUFFIXES = frozenset({".c", ".cpp", ".h", ".hpp", ".js", ".md", ".py", ".pyi", ".rs", ".rst", ".ts", ".txt"})
_PLAIN_TEXT_DOCUMENT_BYTES = 16 * 1024


@dataclass(frozen=True)
class Document:
    """One document; ``path`` names it within its source and decides on which side of the split it falls."""

    path: str
    text: str

    def is_held_out(self, share: float = HELD_OUT_SHARE) -> bool:
        """True for about ``share`` of all paths, by SHA-256 of the path."""
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True)
class Domain:
    """The documents of one source, in the order of their paths."""

    name: str
    documents: tuple[Document, ...]
    held_out_share: float = HELD_OUT_SHARE
    weight: float | None = None
    """Share of the training tokens, relative to the other domains'; None for as many as it has."""

    @cached_property
    def training(self) -> list[str]:
        """Texts of the training documents."""
        return [document.text for document in self.documents if not document.is_held_out(self.held_out_share)]

    @cached_property
    def held_out(self) -> list[str]:
        """Texts of the held-out documents."""
        return [document.text for document in self.documents if document.is_held_out(self.held_out_share)]

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 over each document's path, length in UTF-8 bytes and text, in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            text = document.text.encode()
            digest.update(f"{document.path}\0{len(text)}\0".encode())
            digest.update(text)
        return digest.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """One domain or several."""

    name: str
    domains: tuple[Domain, ...]

    @property
    def documents(self) -> list[Document]:
        """Those of all domains."""
        return [document for domain in self.domains for document in domain.documents]

    @property
    def training(self) -> list[str]:
        """Texts of the training documents."""
        return [text for domain in self.domains for text in domain.training]

    @property
    def held_out(self) -> list[str]:
        """Texts of the held-out documents."""
        return [text for domain in self.domains for text in domain.held_out]

    @property
    def sha256(self) -> str:
        """The domain's, or SHA-256 over the names and hashes of several."""
        if len(self.domains) == 1:
            return self.domains[0].sha256
        lines = "".join(f"{domain.name}\0{domain.sha256}\n" for domain in self.domains)
        return hashlib.sha256(lines.encode()).hexdigest()


def read_mixture(data: Data) -> Corpus:
    """Read every source of a recipe.

    Raises:
        UserError: as ``read_corpus``, for each of them, or two have one name.
    """
    domains = tuple(_read_domain(source, data.held_out) for source in data.sources)
    names = [domain.name for domain in domains]
    if len(set(names)) < len(names):
        raise UserError(f"Two sources of the corpus have one name: {', '.join(names)}. Give each its own 'name'.")
    return Corpus(data.name or ", ".join(domain.name for domain in domains), domains)


def read_corpus(source: str, name: str | None = None) -> Corpus:
    """Read every document of one source (see the module's text); documents without any visible character are dropped.

    Args:
        source: ``stdlib``, a folder or a file.
        name: what to call the corpus in manifests; by default the library's version, or the last part of the path.

    Raises:
        UserError: the source does not exist, cannot be read, or leaves one side of the split without a document.
    """
    return read_mixture(Data(name=name or "", sources=(Source(path=source),)))


def held_out_documents(source: str) -> list[str]:
    """Texts of a corpus' held-out documents, for measurements on text that training never saw.

    Raises:
        UserError: as ``read_corpus``.
    """
    return read_corpus(source).held_out


def read_documents(source: str) -> list[str]:
    """Texts of all documents of one source, none held out.

    Raises:
        UserError: the source does not exist, cannot be read or holds no text.
    """
    return [document.text for document in _read_source(Source(path=source))[1]]


def _read_domain(source: Source, held_out_share: float) -> Domain:
    default_name, documents = _read_source(source)
    domain = Domain(source.name or default_name, tuple(documents), held_out_share, source.weight)
    for split, texts in (("training", domain.training), ("held-out", domain.held_out)):
        if not texts:
            raise UserError(
                f"Corpus {source.path!r} has {len(documents)} documents, none of which falls into the {split} split."
                f" The split is by document, {held_out_share:.0%} held out. Add documents: {round(4 / held_out_share)} make"
                " this unlikely."
            )
    return domain


def _read_source(source: Source) -> tuple[str, list[Document]]:
    """The name a source has by itself, and its documents that are not blank, in the order of their paths."""
    path = Path(source.path)
    if source.path == STANDARD_LIBRARY:
        default_name = f"Python {platform.python_version()} standard library"
        found = _stdlib_documents(Path(sysconfig.get_path("stdlib")))
    elif path.is_dir():
        default_name, found = path.resolve().name, _folder_documents(path, source.text)
    elif path.is_file():
        read = _RECORD_READERS.get(path.suffix)
        default_name = path.name
        found = _plain_documents(path) if read is None else read(path, path.name, source.text)
    else:
        raise UserError(
            f"Corpus {source.path!r} is neither {STANDARD_LIBRARY!r} nor a folder or file on this machine. Give the path of a"
            " folder of text files, or of a .jsonl, .parquet or text file."
        )
    documents = sorted((document for document in found if document.text.strip()), key=lambda document: document.path)
    for document in documents:
        # File names may hold any bytes, and JSON may spell half a surrogate pair.
        try:
            (document.path + document.text).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"Corpus {source.path!r}: the name or the text of {document.path!r} is not valid Unicode. Rename or mend it,"
                " or leave it out."
            ) from None
    if not documents:
        raise UserError(
            f"Corpus {source.path!r} holds no text. Folders are searched for"
            f" {', '.join(sorted(TEXT_SUFFIXES | _RECORD_READERS.keys()))} files."
        )
    return default_name, documents


def _stdlib_documents(root: Path) -> Iterator[Document]:
    for path in _files_below(root):
        # _sysconfigdata is written when Python is built and holds that machine's paths and compiler flags.
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            # The library's own tests hold files that are broken on purpose.
            try:
                yield Document(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue


def _folder_documents(root: Path, field: str) -> Iterator[Document]:
    for path in _files_below(root):
        name = path.relative_to(root).as_posix()
        if (read := _RECORD_READERS.get(path.suffix)) is not None:
            yield from read(path, name, field)
        elif path.suffix in TEXT_SUFFIXES:
            yield Document(name, _read_text(path))


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


def _jsonl_documents(path: Path, name: str, field: str) -> Iterator[Document]:
    # JSON strings may hold the other characters at which Python would cut lines.
    with _readable(path), path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"Corpus: line {number} of {path} is not JSON ({error}). Each line must be one JSON object."
                ) from None
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(
                    f'Corpus: line {number} of {path} has no string "{field}". Each line must be an object with one; a'
                    " recipe's source names another field with 'text'."
                )
            yield Document(str(record.get("path", f"{name}:{number}")), text)


def _parquet_documents(path: Path, name: str, field: str) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, types
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"Corpus: reading {path} takes pyarrow, which is not installed: pip install 'prosparse-serve[train]'."
        ) from None
    try:
        with _readable(path), ParquetFile(path) as file:
            columns = {column.name: column.type for column in file.schema_arrow}
            kind = columns.get(field)
            if kind is None or not (types.is_string(kind) or types.is_large_string(kind)):
                raise UserError(
                    f"Corpus: {path} has no column {field!r} of strings; its columns are {', '.join(columns)}. A recipe's"
                    " source names another column with 'text'."
                )
            wanted = [field, "path"] if "path" in columns else [field]
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    if record[field] is None:
                        raise UserError(
                            f"Corpus: row {row} of {path} has no {field!r}. Leave such rows out of the file."
                        )
                    where = record.get("path")
                    yield Document(f"{name}:{row}" if where is None else str(where), record[field])
    except ArrowException as error:
        raise UserError(f"Corpus: {path} cannot be read as Parquet: {error}. Copy it again, or leave it out.") from None


_RECORD_READERS: dict[str, Callable[[Path, str, str], Iterator[Document]]] = {
    ".jsonl": _jsonl_documents,
    ".parquet": _parquet_documents,
}


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
    with _readable(path):
        return path.read_text(encoding="utf-8")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"Corpus: {path} is not UTF-8 text ({error}). Convert the file, or leave it out.") from None
    except OSError as error:
        raise UserError(f"Corpus: {path} cannot be read ({error}).") from None
