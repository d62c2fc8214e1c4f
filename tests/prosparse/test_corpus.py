import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from sparse_backend.errors import UserError
from sparse_backend.prosparse.corpus import HELD_OUT_SHARE, Document, held_out_documents, read_corpus, read_mixture
from sparse_backend.prosparse.recipe import Data, Source
from tests.prosparse.corpora import write_corpus


def held_out_path(extension: str = ".py") -> str:
    """Some path that falls into the held-out split."""
    return next(path for path in (f"file{n}{extension}" for n in range(10_000)) if Document(path, "").is_held_out())


def training_path(extension: str = ".py") -> str:
    return next(path for path in (f"file{n}{extension}" for n in range(10_000)) if not Document(path, "").is_held_out())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / held_out_path()).write_text("held = out\n")
    (tmp_path / training_path()).write_text("training = text\n")
    return tmp_path


def test_split_is_by_path_alone_and_about_two_percent() -> None:
    paths = [f"package/module_{number}.py" for number in range(20_000)]
    share = sum(Document(path, "a").is_held_out() for path in paths) / len(paths)
    assert share == pytest.approx(HELD_OUT_SHARE, rel=0.15)
    # Fixed forever: published splits depend on it.
    assert not Document("package/module_0.py", "a").is_held_out()
    assert Document("sched.py", "a").is_held_out()
    assert Document("sched.py", "other text").is_held_out()


def test_adding_a_document_moves_no_other(folder: Path) -> None:
    before = read_corpus(str(folder))
    for number in range(50):
        (folder / f"added{number}.txt").write_text(f"text {number}")
    after = read_corpus(str(folder))
    assert set(before.training) < set(after.training)
    assert set(before.held_out) <= set(after.held_out)
    assert before.sha256 != after.sha256


def test_folder_is_read_in_order_and_without_what_is_no_text(folder: Path) -> None:
    for ignored in (".hidden/a.py", "site-packages/b.py", "__pycache__/c.py", "data.bin", "empty.py"):
        (folder / ignored).parent.mkdir(exist_ok=True)
        (folder / ignored).write_text("\n \n" if ignored == "empty.py" else "x = 1\n")
    (folder / "package").mkdir()
    (folder / "package" / "inner.md").write_text("# Title\n")
    documents = read_corpus(str(folder)).documents
    paths = [document.path for document in documents]
    assert paths == sorted([held_out_path(), training_path(), "package/inner.md"])


def test_hash_covers_every_text_and_path(folder: Path) -> None:
    before = read_corpus(str(folder)).sha256
    assert read_corpus(str(folder), "another name").sha256 == before
    (folder / held_out_path()).write_text("held = in\n")
    changed = read_corpus(str(folder)).sha256
    (folder / training_path()).rename(folder / "renamed.py")
    assert len({before, changed, read_corpus(str(folder)).sha256}) == 3


def test_jsonl_with_paths_is_the_same_corpus_as_the_folder(folder: Path, tmp_path: Path) -> None:
    corpus = read_corpus(str(folder))
    lines = tmp_path / "corpus.jsonl"
    with lines.open("w") as file:
        for document in reversed(corpus.documents):
            file.write(json.dumps({"text": document.text, "path": document.path}) + "\n\n")
    assert read_corpus(str(lines)).sha256 == corpus.sha256


def test_line_separators_within_a_jsonl_text_do_not_cut_it(tmp_path: Path) -> None:
    lines = tmp_path / "corpus.jsonl"
    records = [{"path": held_out_path(), "text": "a\u2028b\x0cc"}, {"path": training_path(), "text": "d"}]
    lines.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    assert read_corpus(str(lines)).held_out == ["a\u2028b\x0cc"]


def test_text_file_is_cut_into_documents_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    text = "".join(f"line {number} of a long text\n" for number in range(120_000))
    path.write_text(text)
    corpus = read_corpus(str(path))
    assert "".join(document.text for document in corpus.documents) == text
    assert all(document.text.endswith("\n") for document in corpus.documents)
    assert max(len(document.text) for document in corpus.documents) < 17_000
    assert 0 < len(corpus.held_out) < len(corpus.training)


def test_standard_library_is_there_and_named_after_its_version() -> None:
    corpus = read_corpus("stdlib")
    assert corpus.name.startswith(f"Python {sys.version_info.major}.{sys.version_info.minor}")
    paths = {document.path for document in corpus.documents}
    assert {"json/decoder.py", "sched.py"} <= paths
    assert not [path for path in paths if "site-packages" in path or "_sysconfigdata" in path]
    assert len(held_out_documents("stdlib")) == len(corpus.held_out) > 10


def test_made_up_corpus_of_the_tests_has_both_sides(tmp_path: Path) -> None:
    corpus = read_corpus(str(write_corpus(tmp_path / "corpus.jsonl")))
    assert len(corpus.held_out) >= 3


def test_parquet_with_paths_is_the_same_corpus_as_the_folder(folder: Path, tmp_path: Path) -> None:
    corpus = read_corpus(str(folder))
    rows = [{"text": document.text, "path": document.path, "size": 1} for document in corpus.documents]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    assert read_corpus(str(tmp_path / "corpus.parquet")).sha256 == corpus.sha256


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"content": ["a", "b"], "id": [1, 2]}, ["no column 'text'", "content, id"]),
        ({"text": [1, 2]}, ["no column 'text' of strings"]),
        ({"text": ["a", None]}, ["row 2", "no 'text'"]),
    ],
)
def test_unusable_parquet_is_refused_with_the_reason(
    tmp_path: Path, table: dict[str, list[object]], words: list[str]
) -> None:
    parquet.write_table(pa.table(table), tmp_path / "bad.parquet")
    with pytest.raises(UserError) as caught:
        read_corpus(str(tmp_path / "bad.parquet"))
    assert [word for word in words if word not in str(caught.value)] == []


def test_truncated_parquet_in_a_folder_is_named(folder: Path) -> None:
    shard = folder / "shard.parquet"
    parquet.write_table(pa.table({"text": ["text"] * 5_000}), shard)
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"shard\.parquet cannot be read as Parquet"):
        read_corpus(str(folder))


def test_folder_of_shards_is_read_record_by_record(tmp_path: Path) -> None:
    write_corpus(tmp_path / "first.jsonl")
    parquet.write_table(pa.table({"text": [f"row {number}" for number in range(300)]}), tmp_path / "second.parquet")
    documents = read_corpus(str(tmp_path)).documents
    assert len(documents) == 240 + 300
    assert {"package/module_7.py", "second.parquet:1", "second.parquet:300"} <= {
        document.path for document in documents
    }


def test_mixture_keeps_its_sources_apart_and_moves_no_document(tmp_path: Path) -> None:
    code = write_corpus(tmp_path / "code.jsonl")
    prose = tmp_path / "prose.jsonl"
    prose.write_text("".join(json.dumps({"content": f"sentence {number}."}) + "\n" for number in range(300)))
    sources = (Source(path=str(code), weight=3), Source(path=str(prose), name="prose", text="content", weight=1))
    mixture = read_mixture(Data(sources=sources))
    alone = read_corpus(str(code))
    assert [domain.name for domain in mixture.domains] == ["code.jsonl", "prose"]
    assert [domain.weight for domain in mixture.domains] == [3, 1]
    assert mixture.domains[0].held_out == alone.held_out
    assert (mixture.name, len(mixture.documents)) == ("code.jsonl, prose", 540)
    assert mixture.domains[0].sha256 == alone.sha256 != mixture.sha256
    assert mixture.sha256 != read_mixture(Data(sources=sources[::-1])).sha256


def test_held_out_share_is_the_recipes(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl")
    half = read_mixture(Data(sources=(Source(path=str(path)),), held_out=0.5))
    assert len(half.held_out) == pytest.approx(120, abs=25)
    assert set(read_corpus(str(path)).held_out) < set(half.held_out)


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    path = str(write_corpus(tmp_path / "corpus.jsonl"))
    with pytest.raises(UserError, match=r"corpus\.jsonl, corpus\.jsonl.*'name'"):
        read_mixture(Data(sources=(Source(path=path), Source(path=path))))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone", None, ["gone", "neither 'stdlib' nor a folder"]),
        ("bad.parquet", b"PAR1 and no more", ["bad.parquet", "cannot be read as Parquet"]),
        ("empty.txt", b"", ["no text"]),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
        ("bad.jsonl", b'{"content": "a"}\n', ["line 1", '"text"']),
        ("bad.jsonl", b'["a"]\n', ["line 1", '"text"']),
        ("bad.jsonl", b"[" * 200_000, ["line 1", "not JSON"]),
        ("bad.jsonl", b'{"path": "\\udcff.py", "text": "a"}\n', ["udcff.py", "not valid Unicode"]),
        ("bad.jsonl", b'{"path": "a.py", "text": "\\ud800"}\n', ["a.py", "not valid Unicode"]),
        ("latin.txt", "é".encode("latin-1"), ["latin.txt", "UTF-8"]),
        ("short.txt", b"one line\n", ["held-out split", "Add documents"]),
    ],
)
def test_unusable_source_is_refused_with_the_reason(
    tmp_path: Path, name: str, content: bytes | None, words: list[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_corpus(str(path))
    assert [word for word in words if word not in str(caught.value)] == []


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text"):
        read_corpus(str(tmp_path))


def test_file_name_that_is_not_utf8_is_refused_and_named(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.py")).write_text("a = 1\n")
    with pytest.raises(UserError, match=r"caf\\udce9\.py' is not valid Unicode"):
        read_corpus(str(folder))
