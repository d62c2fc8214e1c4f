"""Both commands from end to end on the CPU, with a model and a corpus small enough for seconds."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.exc import InternalTorchDynamoError
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from sparse_backend.checkpoint import Checkpoint, Manifest, sha256_of
from sparse_backend.prosparse import job, modeling, pretrain
from sparse_backend.prosparse.corpus import read_corpus, read_mixture
from sparse_backend.prosparse.evaluate import measure
from sparse_backend.prosparse.recipe import Data, Source
from sparse_backend.prosparse.recipe_file import read_recipe
from sparse_backend.prosparse.tokens import read_text
from tests.checkpoints import edit_config
from tests.prosparse.jobs import World, command, history

RUN = ["--recipe", "demo", "--context", "128", "--batch", "8", "--tokens", "40000", "--progress-every", "20"]


@pytest.fixture(scope="module")
def made(world: World) -> Path:
    out = world.base.parent / "sparse"
    arguments = ["--corpus", world.corpus, "--corpus-name", "made up", *RUN, "--l1", "1e-3"]
    assert command(job, world.base, out, *arguments) == 0
    return out


def manifest_of(folder: Path) -> Manifest:
    manifest = Checkpoint.open(folder).manifest
    assert manifest is not None
    return manifest


def test_base_is_a_plain_swish_llama_that_learned(world: World) -> None:
    config = json.loads((world.base / "config.json").read_text())
    assert (config["model_type"], config["hidden_act"], config["dtype"]) == ("llama", "silu", "bfloat16")
    assert (config["use_cache"], config["max_position_embeddings"]) == (True, 128)
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    text = read_text(read_corpus(str(world.corpus)), tokenizer, 128)
    loss = measure(AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.bfloat16), text.held_out).loss
    # A model that knows nothing has ln 512 = 6.2.
    assert loss < 4


def test_base_takes_a_tokenizer_that_is_there(world: World, tmp_path: Path) -> None:
    flags = ["--preset", "tiny", "--corpus", world.corpus, "--tokens", 2_000, "--batch", 4]
    assert command(pretrain, tmp_path / "base", *flags, "--tokenizer", world.base) == 0
    assert (tmp_path / "base" / "tokenizer.json").read_bytes() == (world.base / "tokenizer.json").read_bytes()


def test_result_loads_and_gives_what_the_manifest_says(world: World, made: Path) -> None:
    manifest = manifest_of(made)
    modeling.register()
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    text = read_text(read_corpus(str(world.corpus)), AutoTokenizer.from_pretrained(made), 128)
    measured = measure(model, text.held_out)
    assert manifest.held_out.loss == pytest.approx(measured.loss, abs=1e-4)
    assert manifest.held_out.sparsity == pytest.approx(measured.mean_sparsity, abs=1e-4)
    assert manifest.held_out.tokens == text.held_out.blocks.numel()
    assert [layer.sparsity for layer in manifest.layers] == pytest.approx(measured.sparsity.tolist(), abs=1e-4)
    for layer, frequency in zip(manifest.layers, measured.neuron_frequency.tolist(), strict=True):
        assert layer.neuron_frequency == pytest.approx(frequency, abs=1e-4)
    assert manifest.activation.threshold == model.config.hidden_act_param > 0
    assert manifest.architecture == type(model).__name__ == "SparseLlamaForCausalLM"


def test_sparsity_came_without_giving_up_the_text(made: Path) -> None:
    held_out = manifest_of(made).held_out
    assert held_out.sparsity > 0.7
    assert held_out.loss < held_out.base_loss + 0.1


def test_manifest_tells_how_it_was_made(world: World, made: Path) -> None:
    manifest = manifest_of(made)
    assert manifest.command.startswith(
        f"prosparse sparsify {world.base} {made} --corpus {world.corpus} --corpus-name 'made"
    )
    corpus = read_corpus(str(world.corpus))
    assert (manifest.corpus.name, manifest.corpus.sha256) == ("made up", corpus.sha256)
    assert (manifest.corpus.documents, manifest.corpus.held_out_documents) == (240, len(corpus.held_out))
    assert (manifest.base_activation, manifest.device, manifest.seed) == ("silu", "CPU", 0)
    assert manifest.versions["torch"] == torch.__version__
    names = ["pretraining", "ReLU substitution", "L1 regularisation", "activation threshold"]
    assert [phase.name for phase in manifest.phases] == names
    pretraining, relu, l1, shift = manifest.phases
    assert (relu.steps, l1.steps, relu.tokens + l1.tokens) == (2, 38, 40 * 1024)
    assert pretraining.settings["command"].startswith("prosparse pretrain")
    assert relu.settings["learning_rate"] == 1e-3
    assert (l1.settings["reduction"], l1.settings["scale"]) == ("mean_tokens_sum_dff", 1)
    assert l1.settings["stages"] == [{"end": 40, "peak": 1e-3}]
    points = shift.settings["points"]
    assert points[0]["threshold"] == 0
    assert [point["threshold"] for point in points if point.get("chosen")] == [manifest.activation.threshold]
    assert [(domain.name, domain.loss) for domain in manifest.domains] == [("corpus.jsonl", manifest.held_out.loss)]


def test_folder_holds_the_checkpoint_and_nothing_else(world: World, made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert names == {*manifest_of(made).files, "prosparse.json", "report.md", "report"}
    # The held-out text is somebody's: it stays where it is unless asked for.
    assert "held_out.jsonl" not in names
    assert {"model.safetensors", "config.json", "generation_config.json"} < names
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert sha256_of(made / name) == sha256_of(world.base / name)
    assert (made / "model.safetensors").stat().st_mode & 0o044 == 0o044
    assert {tensor.dtype for tensor in load_file(made / "model.safetensors").values()} == {torch.bfloat16}
    assert not list(made.parent.glob("*.partial"))


def test_l1_makes_it_sparse_and_the_order_of_micro_batches_does_not_matter(world: World, made: Path) -> None:
    out = world.base.parent
    arguments = ["--corpus", world.corpus, *RUN]
    assert command(job, world.base, out / "accumulated", *arguments, "--l1", "1e-3", "--micro-batch", 2) == 0
    assert command(job, world.base, out / "unregularised", *arguments, "--l1", 0) == 0
    plain, whole, accumulated = (manifest_of(folder) for folder in (out / "unregularised", made, out / "accumulated"))
    assert accumulated.held_out.loss == pytest.approx(whole.held_out.loss, abs=0.01)
    before_shift = [found.phases[-1].settings["points"][0]["sparsity"] for found in (plain, whole, accumulated)]
    assert before_shift[1] > before_shift[0] + 0.03
    assert before_shift[2] == pytest.approx(before_shift[1], abs=0.01)


def test_compiled_run_takes_the_same_course(world: World, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--corpus", world.corpus, *RUN, "--l1", "1e-3", "--compile"]
    torch._dynamo.utils.counters.clear()
    assert command(job, world.base, out, *arguments) == 0
    expected, found = history(made), history(out)
    for name in ("loss", "eval_loss", "lambda", "sparsity"):
        assert [entry.get(name) for entry in found] == [
            None if name not in entry else pytest.approx(entry[name], rel=1e-3) for entry in expected
        ]
    # λ and the count of zeros compile nothing anew: what trains is one graph, what evaluates another.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_failure_to_compile_is_told_with_the_way_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_trainer: Trainer) -> None:
        raise InternalTorchDynamoError("RuntimeError: Failed to find C compiler.\nmore")

    monkeypatch.setattr(Trainer, "train", fail)
    assert command(job, world.base, tmp_path / "out", "--corpus", world.corpus, *RUN) == 2
    assert "here: RuntimeError: Failed to find C compiler. Give --no-compile" in capsys.readouterr().err


def test_same_command_gives_the_same_weights(world: World, made: Path, tmp_path: Path) -> None:
    assert command(job, world.base, tmp_path / "again", "--corpus", world.corpus, *RUN, "--l1", "1e-3") == 0
    again, first = load_file(tmp_path / "again" / "model.safetensors"), load_file(made / "model.safetensors")
    for name, tensor in first.items():
        torch.testing.assert_close(again[name], tensor)


def test_no_budget_gives_a_relu_model_that_is_then_taken_as_a_base(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--corpus", world.corpus, "--context", 128, "--batch", 8, "--tokens", 8192]
    out = tmp_path / "relu"
    # A negative budget cannot be asked for; a sweep that always costs something keeps threshold 0.
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("extends: demo\nthreshold: {sweep: [50], budget: 0}\n")
    assert command(job, world.base, out, *arguments, "--recipe", recipe) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["hidden_act"]) == (["LlamaForCausalLM"], "relu")
    assert Checkpoint.open(out).activation.kind == "relu"
    capsys.readouterr()
    assert command(job, out, tmp_path / "twice", *arguments) == 0
    assert "step 1: BASE computes ReLU already" in capsys.readouterr().out


BAD_BASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "not a folder": (shutil.rmtree, ["BASE", "not a model folder"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "list"]),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
    "other family": (
        lambda f: edit_config(f, model_type="opt"),
        ["model_type 'opt'", "llama, mistral, qwen2, qwen3, minicpm"],
    ),
    "quantised": (lambda f: edit_config(f, quantization_config={"bits": 4}), ["quantised", "quantization_config"]),
    "ProSparse already": (lambda f: edit_config(f, model_type="sparsellama"), ["all three steps already"]),
    "other activation": (lambda f: edit_config(f, hidden_act="tanh"), ["hidden_act 'tanh'", "Swish or GELU"]),
    "activation is a list": (lambda f: edit_config(f, hidden_act=["silu"]), ["hidden_act ['silu']", "Swish or GELU"]),
    "config too deep": (lambda f: (f / "config.json").write_text("[" * 200_000), ["config.json", "JSON"]),
    "unreadable record of pretraining": (
        lambda f: (f / "pretraining.json").write_text("{"),
        ["pretraining.json", "cannot be read as JSON"],
    ),
    "damaged record of pretraining": (
        lambda f: (f / "pretraining.json").write_text('{"name": "pretraining"}'),
        ["pretraining.json", "steps", "Restore the file"],
    ),
    "biases": (lambda f: edit_config(f, mlp_bias=True), ["mlp_bias"]),
    "no vocabulary size": (lambda f: edit_config(f, vocab_size=None), ["vocab_size", "whole number"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["safetensors"]),
    "weights of another shape": (lambda f: edit_config(f, intermediate_size=128), ["cannot be loaded"]),
    "truncated weights": (lambda f: _truncate(f / "model.safetensors"), ["cannot be loaded"]),
    "missing layer": (lambda f: edit_config(f, num_hidden_layers=3), ["model.layers.2", "do not belong together"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["no tokenizer"]),
    "unreadable tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ["no tokenizer"]),
    "tokenizer of another model": (lambda f: _grow_tokenizer(f), ["tokenizer", "vocab_size"]),
    "tokenizer too small": (lambda f: _shrink_tokenizer(f), ["tokenizer", "far fewer than the"]),
    "tokenizer of another model of its size": (lambda f: _permute_tokenizer(f), ["tokenizer", "guessing has"]),
    "short context": (lambda f: edit_config(f, max_position_embeddings=64), ["--context is 128", "64 tokens"]),
}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _grow_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["an additional token"])
    tokenizer.save_pretrained(folder)


def _shrink_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    model = content["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < 300}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    path.write_text(json.dumps(content))


def _permute_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    # The special tokens are the first three.
    others = len(vocabulary) - 3
    content["model"]["vocab"] = {token: n if n < 3 else 3 + (n - 3 + 100) % others for token, n in vocabulary.items()}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("case", BAD_BASES)
def test_unusable_base_is_refused_with_nothing_left_behind(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, words = BAD_BASES[case]
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    damage(base)
    assert command(job, base, tmp_path / "out", "--corpus", world.corpus, *RUN) == 2
    error = capsys.readouterr().err
    assert error.startswith("prosparse: error: ")
    assert [word for word in words if word not in error] == []
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--l1", "nan"], ["--l1 is nan"]),
        (["--corpus", "no/such/place"], ["no/such/place"]),
        (["--progress-every", "0"], ["--progress-every is 0"]),
        (["--learning-rate", "1e30", "--warmup", "0"], ["became", "--learning-rate"]),
    ],
)
def test_unusable_flags_are_refused_with_nothing_left_behind(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    assert command(job, world.base, tmp_path / "out", "--corpus", world.corpus, *RUN, *flags) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", [".", "/"])
def test_output_that_is_a_folder_by_another_name_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(job, world.base, out, "--corpus", world.corpus, *RUN) == 2
    assert capsys.readouterr().err.startswith("prosparse: error: OUT")
    assert not list(tmp_path.iterdir())


def test_full_disk_after_training_keeps_the_weights_and_says_where(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = ["--corpus", world.corpus, "--context", 128, "--batch", 8, "--tokens", 8192]
    monkeypatch.setattr(Manifest, "write", fail)
    assert command(job, world.base, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert f"kept in {str(tmp_path / 'out.partial')!r}" in error
    assert load_file(tmp_path / "out.partial" / "trainer" / "checkpoint-8" / "model.safetensors")
    assert not (tmp_path / "out").exists()
    # Once there is space, nothing is trained again.
    monkeypatch.undo()
    assert command(job, world.base, tmp_path / "out", *arguments) == 0
    assert "step 8/8" not in capsys.readouterr().out
    assert Checkpoint.open(tmp_path / "out").manifest is not None
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_named(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(job, world.base, tmp_path / "out", "--corpus", world.corpus, *RUN, "--device", "cuda") == 2
    assert "--device is cuda" in capsys.readouterr().err


def test_unfinished_run_of_another_process_is_not_touched(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "file").write_text("kept")
    assert command(pretrain, tmp_path / "out", "--corpus", world.corpus, "--preset", "tiny") == 2
    assert "out.partial" in capsys.readouterr().err
    assert (tmp_path / "out.partial" / "file").read_text() == "kept"


def test_existing_output_is_refused_by_the_module_itself_without_a_traceback(world: World, made: Path) -> None:
    before = sha256_of(made / "prosparse.json")
    arguments = [str(world.base), str(made), "--corpus", str(world.corpus)]
    finished = subprocess.run(
        [sys.executable, "-m", "sparse_backend.prosparse.job", *arguments], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("prosparse: error: OUT")
    assert "Traceback" not in finished.stderr
    assert sha256_of(made / "prosparse.json") == before


def test_existing_output_is_refused_before_any_text_is_read(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(job, world.base, tmp_path, "--corpus", "no/such/place", *RUN) == 2
    assert f"OUT {str(tmp_path)!r} exists already" in capsys.readouterr().err


def test_stop_after_a_step_that_the_recipe_does_not_have_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages: [{peak: 1e-3, steps: 4}]")
    arguments = ["--recipe", recipe, "--corpus", world.corpus, "--stop-after", "relu"]
    assert command(job, world.base, tmp_path / "out", *arguments) == 2
    assert "--stop-after relu: the recipe has no stage with λ = 0" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"held_out": 0.5}, {"sources": {"weight": 2.0}}], ids=["split", "mixture"])
def test_a_run_with_another_split_or_mixture_is_another_run(world: World, change: dict[str, Any]) -> None:
    def settings(held_out: float = 0.2, sources: dict[str, Any] | None = None) -> dict[str, Any]:
        data = Data(held_out=held_out, sources=(Source(path=str(world.corpus), **(sources or {})),))
        return job.settings_of(world.base, read_mixture(data), read_recipe("demo"))

    assert settings() == settings()
    assert settings() != settings(**change)
