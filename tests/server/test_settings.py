import argparse
import re
from pathlib import Path

import pytest

from server.settings import CPU_ISAS, OTHER_ENVIRONMENT_KEYS, Settings, add_flags, check_environment, flag_of
from sparse_backend.errors import UserError


def parse(*words: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return Settings.load(vars(parser.parse_args(words)))


@pytest.fixture
def config(tmp_path):
    def write(text: str, name: str = "settings.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_flag_over_environment_over_file_over_default(monkeypatch, config):
    path = str(config("model: from-file\nport: 1001\ndrain-timeout: 1\nffn_path: dense\n"))
    settings = parse("--config", path)
    assert (settings.model, settings.port, settings.drain_timeout, settings.host) == (
        Path("from-file"),
        1001,
        1.0,
        "127.0.0.1",
    )
    monkeypatch.setenv("PROSPARSE_PORT", "1002")
    monkeypatch.setenv("PROSPARSE_DRAIN_TIMEOUT", "2")
    settings = parse("from-flag", "--config", path, "--drain-timeout", "3")
    assert (settings.model, settings.port, settings.drain_timeout) == (Path("from-flag"), 1002, 3.0)
    assert settings.ffn_path == "dense"


@pytest.mark.parametrize(
    ("name", "text"),
    [("s.yaml", "port: 1001"), ("s.yml", "port: 1001"), ("s.toml", "port = 1001"), ("s.yaml", "# nothing")],
)
def test_file_formats_and_the_environment_naming_the_file(name, text, monkeypatch, config):
    monkeypatch.setenv("PROSPARSE_CONFIG", str(config(text, name)))
    assert parse("m").port == (1001 if "1001" in text else 8000)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("prot: 1", "s.yaml", "has the key 'prot', which is no setting (did you mean port?)"),
        ("config: other.yaml", "s.yaml", "has the key 'config'"),
        ("- port", "s.yaml", "holds list where settings"),
        ("port: [", "s.yaml", "cannot be read"),
        ("port = ", "s.toml", "cannot be read"),
        ("{}", "s.json", "must end in .toml, .yaml or .yml"),
        ("port: many", "s.yaml", "port in the settings file 'many'"),
    ],
)
def test_bad_files_are_refused(text, name, expected, config):
    with pytest.raises(UserError, match=re.escape(expected)):
        parse("m", "--config", str(config(text, name)))


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--config .*absent\.yaml cannot be read"):
        parse("m", "--config", str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("key", ["PROSPARSE_PROT", "prosparse_prot", "PROSPARSE_"])
def test_unknown_environment_keys_are_refused(key, monkeypatch):
    monkeypatch.setenv(key, "1")
    with pytest.raises(UserError, match=f"the environment has {key}, which is no setting"):
        check_environment()


@pytest.mark.parametrize("key", sorted(OTHER_ENVIRONMENT_KEYS))
def test_environment_keys_of_other_rooms_are_known(key, monkeypatch):
    monkeypatch.setenv(key, "avx2")
    check_environment()


@pytest.mark.parametrize("isa", ["", *CPU_ISAS])
def test_known_instruction_sets_pass(isa, monkeypatch):
    monkeypatch.setenv("PROSPARSE_CPU_ISA", isa)
    check_environment()


def test_instruction_sets_without_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("PROSPARSE_CPU_ISA", "avx3")
    with pytest.raises(UserError, match="PROSPARSE_CPU_ISA is 'avx3'; known are amx, "):
        check_environment()


def test_the_known_instruction_sets_are_those_with_kernels():
    sources = Path(__file__).parents[2] / "sparse_backend" / "ffn" / "csrc" / "cpu"
    assert {f"isa_{isa}.cpp" for isa in CPU_ISAS} == {path.name for path in sources.glob("isa_*.cpp")}


def test_every_environment_key_the_sources_read_is_known():
    root = Path(__file__).parents[2]
    used = {
        key
        for path in (root / "sparse_backend").rglob("*.py")
        for key in re.findall(r'"(PROSPARSE_[A-Z_]+)"', path.read_text())
    }
    assert used
    assert used <= OTHER_ENVIRONMENT_KEYS | {"PROSPARSE_" + name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "MODEL is missing"),
        (["m", "--port", "0"], "--port '0'"),
        (["m", "--port", "70000"], "--port '70000'"),
        (["m", "--ffn-path", "fast"], "--ffn-path 'fast'"),
        (["m", "--drain-timeout", "-1"], "--drain-timeout '-1'"),
        (["m", "--drain-timeout", "nan"], "--drain-timeout 'nan'"),
        (["m", "--dtype", "float8"], "--dtype 'float8'"),
        (["m", "--served-model-name", ""], "--served-model-name ''"),
        (["m", "--api-key", " "], "--api-key: a key is empty"),
        (["m", "--max-n", "0"], "--max-n '0'"),
        (["m", "--queue-requests", "-1"], "--queue-requests '-1'"),
        (["m", "--request-timeout", "0"], "--request-timeout '0'"),
        (["m", "--metrics-access", "all"], "--metrics-access 'all'"),
        (["m", "--log-prompts", "maybe"], "--log-prompts 'maybe'"),
    ],
)
def test_unusable_values_name_the_flag(words, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        parse(*words)


def test_an_unusable_value_names_the_environment_key(monkeypatch):
    monkeypatch.setenv("PROSPARSE_PORT", "many")
    with pytest.raises(UserError, match="PROSPARSE_PORT in the environment 'many'"):
        parse("m")


def keys(settings: Settings) -> list[str]:
    return [key.get_secret_value() for key in settings.api_key]


def test_keys_come_from_flags_or_the_environment(monkeypatch):
    assert keys(parse("m", "--api-key", "k1", "--api-key", "alice k2")) == ["k1", "alice k2"]
    monkeypatch.setenv("PROSPARSE_API_KEY", "k5,bob k6")
    assert keys(parse("m")) == ["k5", "bob k6"]
    assert "k5" not in repr(parse("m"))


@pytest.mark.parametrize("value", ["", "k1,", "a b c", "sha256:00"])
def test_a_key_in_the_environment_that_is_none_does_not_open_the_server(value, monkeypatch):
    monkeypatch.setenv("PROSPARSE_API_KEY", value)
    with pytest.raises(UserError, match="PROSPARSE_API_KEY in the environment: ") as caught:
        parse("m")
    assert "k1" not in str(caught.value)


def test_limits_can_be_set_in_every_way(monkeypatch, config):
    monkeypatch.setenv("PROSPARSE_MAX_N", "2")
    monkeypatch.setenv("PROSPARSE_CHAT_TEMPLATE_KWARGS", "a, b")
    settings = parse(
        "m", "--max-body-bytes", "100", "--config", str(config("queue_requests: 5\ncors_origins: [a, b]\n"))
    )
    assert (settings.max_n, settings.max_body_bytes, settings.queue_requests) == (2, 100, 5)
    assert (settings.chat_template_kwargs, settings.cors_origins) == (("a", "b"), ("a", "b"))


def test_vllm_flags_from_the_environment_are_split_like_a_shell_does(monkeypatch):
    monkeypatch.setenv("PROSPARSE_VLLM_FLAGS", "--max-num-seqs 4 --chat-template 'a b'")
    assert parse("m").vllm_flags == ("--max-num-seqs", "4", "--chat-template", "a b")


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--port=1", "give --port before the `--`"),
        ("--served_model_name", "give --served-model-name before the `--`"),
        ("--shutdown-timeout", "give --drain-timeout before the `--`"),
        ("--additional-config.prosparse", "give --ffn-path before the `--`"),
        ("--trust-remote-code", "--trust-remote-code is refused"),
        ("--trust_remote_code", "--trust-remote-code is refused"),
        ("--worker-extension-cls", "--worker-extension-cls is refused"),
        ("--hf-overrides.architectures", "--hf-overrides is refused"),
        ("--data_parallel_rank=1", "--data-parallel-rank is refused: one `prosparse serve` runs all replicas"),
        ("-dpe", "-dpe is refused: one `prosparse serve` runs all replicas"),
        ("--enable-tokenizer-info-endpoint", "--enable-tokenizer-info-endpoint is refused: its path is not served"),
        ("--enable-server-load-tracking", "--enable-server-load-tracking is refused: its path is not served"),
        ("--help", "--help is refused: `vllm serve --help` shows"),
        ("--help=all", "--help is refused: `vllm serve --help` shows"),
        ("-h", "-h is refused: `vllm serve --help` shows"),
    ],
)
def test_vllm_flags_that_are_ours_or_unsafe_are_refused(flag, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        Settings.load({"model": "m", "vllm_flags": ["--max-num-seqs", "4", flag]})


def test_every_setting_has_a_flag_and_says_what_it_does():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    help_text = parser.format_help()
    for name, field in Settings.model_fields.items():
        assert field.description
        assert name == "vllm_flags" or flag_of(name) in help_text


def test_help_shows_the_choices():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    help_text = parser.format_help()
    assert "--ffn-path {auto,sparse,dense}" in help_text
    assert "--dtype {auto,bfloat16,float16,float32}" in help_text
    assert "--log-level {debug,info,warning,error}" in help_text
    assert "--port PORT" in help_text


@pytest.mark.parametrize("flag", ["itl_slo_ms", "ttft_slo_ms", "max_unfairness_ms"])
def test_objectives_without_the_policy_that_keeps_them_are_refused(flag):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} is for --batching sparse"):
        Settings.load({"model": "m", flag: "20"})
    assert getattr(Settings.load({"model": "m", flag: "20", "batching": "sparse"}), flag) == 20
