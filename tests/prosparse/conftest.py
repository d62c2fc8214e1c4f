import pytest

from sparse_backend.prosparse import pretrain
from tests.prosparse.corpora import write_corpus
from tests.prosparse.jobs import World, command


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("prosparse")
    corpus = write_corpus(folder / "corpus.jsonl")
    arguments = ["--preset", "tiny", "--corpus", corpus, "--tokens", 80_000, "--batch", 8]
    assert command(pretrain, folder / "base", *arguments) == 0
    return World(corpus, folder / "base")
