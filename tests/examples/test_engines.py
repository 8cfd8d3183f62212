"""The example files name commands, options, folders and ports that exist."""

import re
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

import daemon.cli
from daemon.config import Config
from deploy.triton import Repository

ENGINES = Path(__file__).resolve().parents[2] / "examples" / "engines"


def load(name: str) -> Any:
    """One YAML file."""
    return pytest.importorskip("yaml", reason="pyyaml is not installed").safe_load(
        (ENGINES / name).read_text()
    )


def mounts(service: Any) -> dict[str, str]:
    """{path in the container: volume or file}."""
    return {target: source for source, target, *_ in (entry.split(":") for entry in service["volumes"])}


def test_compose_runs_commands_that_exist() -> None:
    """Each dynlora command parses as the program parses it, the one that makes the home among them."""
    commands = {
        name: service.get("command", []) for name, service in load("compose.yaml")["services"].items()
    }
    (first,) = re.findall(r"run --rm daemon (dynlora .*?) +# once", (ENGINES / "compose.yaml").read_text())
    commands["first"] = first.split()
    assert commands["first"][1:] == ["init", commands["daemon"][2]]
    for name, words in commands.items():
        if words[:1] == ["dynlora"]:
            group = daemon.cli.program
            with click.Context(group, info_name="dynlora") as context:
                _, rest, _ = group.make_parser(context).parse_args(list(words[1:]))
                assert rest[0] in group.commands, name
                group.commands[rest[0]].make_context(rest[0], rest[1:], parent=context).close()


def test_compose_and_its_configuration_speak_of_the_same_places() -> None:
    """The daemon writes where Triton and the file server read, and asks Triton where it listens."""
    compose = load("compose.yaml")
    services = compose["services"]
    config = Config.model_validate(tomllib.loads((ENGINES / "config.toml").read_text()))

    assert mounts(services["daemon"])[config.triton.repository] == "models"
    assert mounts(services["daemon"])[config.mirror.url] == "mirror"
    assert mounts(services["triton"])["/models"] == "models"
    assert mounts(services["files"])["/usr/share/nginx/html"] == "mirror"
    assert "--model-repository=/models" in services["triton"]["command"]
    assert config.triton.server == "http://triton:8000"
    assert services["triton"]["ports"] == ["127.0.0.1:8000:8000"]
    assert f"http://{'files'}" in services["edge"]["command"]
    assert services["edge"]["command"][3] in mounts(services["edge"])
    for service in services.values():
        for target, source in mounts(service).items():
            assert source in compose["volumes"] or (ENGINES / source).is_file(), target


def test_kserve_loads_the_models_that_are_written() -> None:
    """In explicit mode, under the names that the repository has by default."""
    service = load("kserve.yaml")
    model = service["spec"]["predictor"]["model"]
    wanted = {f"--load-model={name}" for name in Repository(Path("/nowhere")).models.values()}

    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert service["kind"] == "InferenceService"
    assert {"--model-control-mode=explicit", "--exit-on-error=false", *wanted} == set(model["args"])
    assert model["ports"][0]["containerPort"] == 8080  # KServe's runtime starts Triton with --http-port=8080


def test_triton_is_started_in_one_way() -> None:
    """In explicit mode, in every example and on the page."""
    page = (ENGINES.parents[1] / "docs/engines.md").read_text().replace("\n", " ")
    kserve = load("kserve.yaml")["spec"]["predictor"]["model"]["args"]
    compose = load("compose.yaml")["services"]["triton"]["command"]

    assert all(argument in page for argument in kserve if argument != "--exit-on-error=false")
    assert "--model-control-mode=explicit" in compose
