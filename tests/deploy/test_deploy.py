"""What can be told of the images and the compose file without an engine to run them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomli
import yaml

from lattice_serve.server.metrics import ServerMetrics
from lattice_serve.server.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def secrets(service: dict[str, Any]) -> set[str]:
    return {secret["source"] for secret in service.get("secrets", ())}


def panels() -> list[dict[str, Any]]:
    made = json.loads((DEPLOY / "grafana" / "lattice.json").read_text(encoding="utf-8"))["panels"]
    return [panel for each in made for panel in (each, *each.get("panels", []))]


@pytest.fixture(scope="module")
def metrics() -> str:
    """What Prometheus is given."""
    return ServerMetrics("m", 2).render().decode()


def is_answered(expression: str, metrics: str) -> bool:
    """Whether every metric in it, and every value of a label that it names, is there."""
    names = set(re.findall(r"lattice:\w+", expression))
    values = set(re.findall(r"\w+!?=(\"\w+\")", expression))
    known = set(re.findall(r"^(lattice:\w+)", metrics, re.MULTILINE))
    return bool(names) and names <= known and all(f"={value}" in metrics for value in values)


def test_the_dashboard_asks_for_metrics_that_there_are(metrics: str) -> None:
    asked = [target["expr"] for panel in panels() for target in panel.get("targets", [])]
    assert len(asked) > 20
    assert [expression for expression in asked if not is_answered(expression, metrics)] == []


def test_alerts_ask_for_metrics_that_there_are(metrics: str) -> None:
    [group] = load("alerts.yml")["groups"]
    [job] = load("prometheus.yml")["scrape_configs"]
    down, *asked = [rule["expr"] for rule in group["rules"]]
    assert down == f'up{{job="{job["job_name"]}"}} == 0'
    assert [expression for expression in asked if not is_answered(expression, metrics)] == []


def test_prometheus_is_given_its_rules() -> None:
    [name] = load("prometheus.yml")["rule_files"]
    mounted = {volume.split(":")[1] for volume in load("compose.yaml")["services"]["prometheus"]["volumes"]}
    assert {"/etc/prometheus/prometheus.yml", f"/etc/prometheus/{name}"} <= mounted


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Prometheus's promtool")
def test_alerts_go_off() -> None:
    subprocess.run(["promtool", "test", "rules", str(Path(__file__).with_name("alerts.yml"))], check=True)


def test_prometheus_asks_the_server_with_its_key() -> None:
    [job] = load("prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{Settings.model_fields['port'].default}"]}]
    secret = job["authorization"]["credentials_file"]
    services = load("compose.yaml")["services"]
    assert secret == services["server"]["environment"]["LATTICE_API_KEY_FILE"]
    assert secret.rpartition("/")[2] in secrets(services["prometheus"])


def test_settings_in_the_compose_files_are_the_servers() -> None:
    compose = load("compose.yaml")
    environment = compose["services"]["server"]["environment"]
    both = environment | load("compose.gpu.yaml")["services"]["server"]["environment"]
    assert {name.removeprefix("LATTICE_").lower() for name in both} <= Settings.model_fields.keys()
    grace = int(compose["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert grace > environment["LATTICE_GRACE_PERIOD"]


def test_what_is_mounted_and_named_is_there() -> None:
    compose = load("compose.yaml")
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), volume
        assert secrets(service) <= compose["secrets"].keys()
        assert all(secret["mode"] == 0o444 for secret in service.get("secrets", ())), "its user is not root"
    assert (ROOT / compose["services"]["server"]["build"]["dockerfile"]).exists()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_has_all_packages_and_no_root(name: str) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert all((ROOT / source).exists() for source in sources)
    packages = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    assert set(packages.values()) <= sources
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{source}" for source in sources} <= set(allowed)
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] not in ("root", "0", "0:0")
    assert "HEALTHCHECK" in text
    assert not re.search(r"^ADD ", text, re.MULTILINE)


def pinned(name: str) -> dict[str, set[str]]:
    """Name of each requirement of a file, and its lines `name==version`."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([a-z0-9-]+)==([^ ;]+)", line):
            found.setdefault(match[1], set()).add(match[2])
    return found


def test_the_images_install_the_pinned_versions_of_all_that_is_declared_with_hashes() -> None:
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions, listed = pinned("constraints.txt"), pinned("deploy/requirements.txt")
    listed_gpu = pinned("deploy/requirements-gpu.txt")
    names = {re.split(r"[<>=; ]", each)[0] for each in project["dependencies"]}
    assert names - listed.keys() == {"torch"}
    assert listed_gpu.keys() == {"triton"}
    assert {name: got for name, got in (listed | listed_gpu).items() if not got <= versions.get(name, set())} == {}
    for name in ("requirements.txt", "requirements-gpu.txt", "requirements-sbom.txt"):
        text = (DEPLOY / name).read_text(encoding="utf-8")
        requirements = re.split(r"\n(?=[a-z])", text.partition("\n")[2])
        assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", requirement) for requirement in requirements)
        assert "://" not in text


@pytest.mark.parametrize("name", DOCKERFILES)
def test_pip_checks_hashes_of_all_but_torch(name: str) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8").replace("\\\n", " ")
    installs = re.findall(r"pip install ([^\n&]+)", text)
    unchecked = [each for each in installs if "--require-hashes" not in each and "--no-index" not in each]
    assert all("torch" in each.split()[-1] for each in unchecked)
    assert "cyclonedx-py environment" in text
    assert re.search(r"^COPY --from=sbom \S+ /usr/share/doc/", text, re.MULTILINE)


def test_containers_are_confined() -> None:
    for name, service in load("compose.yaml")["services"].items():
        assert service["read_only"], name
        assert service["tmpfs"] == ["/tmp"], name
        assert service["mem_limit"], name
        assert service["pids_limit"] <= 512, name
        assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"]), name
    mounted = {volume.rpartition(":")[2] for volume in load("compose.yaml")["services"]["server"]["volumes"]}
    assert "/var/cache/lattice/numba" in mounted


@pytest.mark.parametrize("name", DOCKERFILES)
def test_pip_has_certificates_in_every_stage_that_runs_it(name: str) -> None:
    # Debian 13's does not start without, whatever it is to do; its slim image has none.
    text = (DEPLOY / name).read_text(encoding="utf-8")
    having: set[str] = set()
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        base, _, named = stage.partition("\n")[0].partition(" AS ")
        if base in having or re.search(r"apt-get install .*\bca-certificates\b", stage):
            having.add(named)
        assert named in having or not re.search(r"^[^#\n]*\bpip (install|wheel)\b", stage, re.MULTILINE), named


@pytest.mark.parametrize("name", DOCKERFILES)
def test_folders_of_compiled_code_are_the_users(name: str) -> None:
    # A volume over a folder that the image lacks is root's, and the server could not write it.
    text = (DEPLOY / name).read_text(encoding="utf-8")
    asked = set(re.findall(r"\b[A-Z]+_CACHE_DIR=(/\S+)", text))
    made = {folder for line in re.findall(r"install --directory --owner=lattice .*", text) for folder in line.split()}
    if "RUN lattice generate" in text:  # as the user
        made |= set(re.findall(r"\bNUMBA_CACHE_DIR=(/\S+)", text))
    assert asked
    assert asked <= made
