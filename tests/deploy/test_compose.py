"""docker-compose.yml against the compose-spec's schema and docker-compose itself, and what the project asks of every service."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from jsonschema.validators import validator_for

from server.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
COMPOSE = yaml.safe_load(FILE.read_text())
SERVICES = COMPOSE["services"]
EXAMPLE = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
PROFILES = ("cpu", "gpu", "job", "job-cpu")

each_service = pytest.mark.parametrize("name", SERVICES)


def test_the_compose_spec_schema_accepts_it():
    # check-jsonschema carries the schema of the compose-spec project; only the file is wanted, not its command.
    package = Path(importlib.util.find_spec("check_jsonschema").submodule_search_locations[0])
    schema = json.loads((package / "builtin_schemas" / "vendor" / "compose-spec.json").read_text())
    errors = validator_for(schema)(schema).iter_errors(COMPOSE)
    assert [f"{list(error.path)}: {error.message}" for error in errors] == []


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="no docker-compose: on Debian apt-get install it")
@pytest.mark.parametrize("settings", [{}, EXAMPLE], ids=["defaults", "example"])
def test_docker_compose_accepts_it(settings, tmp_path):
    subprocess.run([ROOT / "deploy/docker/make-secrets", tmp_path], check=True, capture_output=True)
    done = subprocess.run(
        ["docker-compose", "--file", FILE, *(f"--profile={profile}" for profile in PROFILES), "config"],
        env={"PATH": os.environ["PATH"], **settings, "SECRETS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == set(SERVICES)


def test_the_example_lists_the_variables_and_their_defaults():
    used = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", FILE.read_text()))
    assert set(re.findall(r"\$\{([A-Z_]+)", FILE.read_text())) == set(used), "a variable has no default"
    assert set(EXAMPLE) == set(used)
    by_profile = {"SERVER_MEMORY", "JOB_MEMORY"}
    assert {name: EXAMPLE[name] for name in used.keys() - by_profile} == {
        name: used[name] for name in used.keys() - by_profile
    }


@each_service
def test_no_privileges(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert "cap_add" not in service
    # Our own images have a user of their own, who is not root (test_docker.py).
    assert "build" in service or int(service["user"].split(":")[0]) > 0


@each_service
def test_what_is_reachable_and_how_much_it_may_take(name):
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "memory" in service["deploy"]["resources"]["limits"]
    assert re.search(r":v?\d+\.\d+\.\d+(-\w+)?$", service["image"]), "the image's version is not pinned"
    assert name.startswith(("server", "job")) or "test" in service["healthcheck"]


@each_service
def test_checkpoints_and_configuration_are_mounted_read_only(name):
    for mount in SERVICES[name]["volumes"]:
        source, target, *mode = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", mount).split(":")
        written = source in COMPOSE["volumes"] or target == "/models"
        assert mode == ([] if written else ["ro"]), mount


@pytest.mark.parametrize("name", ["server-gpu", "job"])
def test_gpus_are_reserved(name):
    (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


@pytest.mark.parametrize("name", ["server-cpu", "server-gpu"])
def test_the_server_is_told_settings_it_has(name):
    environment = SERVICES[name]["environment"]
    assert {key.removeprefix(PREFIX).lower() for key in environment} <= set(Settings.model_fields)


def test_docker_waits_longer_than_the_server_drains():
    assert int(EXAMPLE["STOP_GRACE_PERIOD"].removesuffix("s")) >= int(EXAMPLE["DRAIN_TIMEOUT"]) + 15
