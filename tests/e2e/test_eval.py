"""`prosparse eval` against the running server, and what it says where it cannot work."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server import cli
from sparse_backend.prosparse import modeling
from tests.e2e.conftest import DEMO
from tests.e2e.servers import Server, free_port

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'prosparse-serve[eval]'")

DOCUMENTS = [Path(json.__file__).read_text()[:4000], Path(json.decoder.__file__).read_text()[:3000]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    return path


def transformers_loss() -> tuple[float, int]:
    """Nats and tokens of the documents, each behind the tokenizer's BOS, or EOS where it has none."""
    modeling.register()
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    nats, tokens = 0.0, 0
    for document in DOCUMENTS:
        ids = torch.tensor([[first, *tokenizer(document, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return nats, tokens


def test_perplexity_is_that_of_transformers(server: Server, text: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "result.json"
    assert cli.main(["eval", str(DEMO), "--url", server.url, "--text", str(text), "--out", str(out)]) == 0
    assert "perplexity" in capsys.readouterr().out
    found = json.loads(out.read_text())["results"][str(text)]
    nats, tokens = transformers_loss()
    n_bytes = sum(len(document.encode()) for document in DOCUMENTS)
    assert found["samples"] == len(DOCUMENTS)
    assert math.log(found["perplexity"]) == pytest.approx(nats / tokens, abs=5e-3)
    assert found["bits_per_byte"] == pytest.approx(nats / n_bytes / math.log(2), abs=5e-3)


def test_tasks_of_a_folder(server: Server, text: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choice.yaml").write_text(
        f"""
        task: choice
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {json.dumps(str(text))}}}}}
        test_split: test
        output_type: multiple_choice
        doc_to_text: "import json\\nimport"
        doc_to_choice: ["sys", "%%%%"]
        doc_to_target: 0
        """
    )
    arguments = ["--url", server.url, "--tasks", "choice", "--include-path", str(tmp_path / "tasks"), "--limit", "1"]
    assert cli.main(["eval", str(DEMO), *arguments]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if " acc " in line)
    assert "1.0000" in row


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--text", "absent.txt"], "absent.txt"),
        (["--limit", "0"], "--limit is 0"),
        (["--include-path", "tasks"], "--tasks"),
        (["--out", "absent/result.json"], "absent/result.json"),
        (["--tasks", "no_such_task_of_the_harness", "--include-path", str(DEMO)], "no_such_task_of_the_harness"),
    ],
)
def test_mistakes(server: Server, arguments: list[str], expected: str, capsys) -> None:
    assert cli.main(["eval", str(DEMO), "--url", server.url, *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_no_server(text: Path, capsys) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert cli.main(["eval", str(DEMO), "--url", url, "--text", str(text)]) == 2
    assert f"--url '{url}': no server answers" in capsys.readouterr().err
