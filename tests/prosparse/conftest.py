from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sparse_backend.prosparse import pretrain
from tests.prosparse.corpora import write_corpus
from tests.prosparse.jobs import World, command


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch here and in processes started meanwhile.

    Models of this size gain little from a second one, and on a busy machine the two wait for each other most of the time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("prosparse")
    corpus = write_corpus(folder / "corpus.jsonl")
    arguments = ["--preset", "tiny", "--corpus", corpus, "--tokens", 80_000, "--batch", 8]
    # Of the whole session, so made before the fixture above is.
    with one_thread():
        assert command(pretrain, folder / "base", *arguments) == 0
    return World(corpus, folder / "base")
