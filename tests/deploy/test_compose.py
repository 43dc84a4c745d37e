"""compose.yaml names only what exists, and settings that the server has."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sluice_service.settings import Settings


@pytest.fixture(scope="module")
def services(root: Path) -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((root / "deploy/compose.yaml").read_text())[
        "services"
    ]
    return services


def test_every_file_that_is_mounted_exists(root: Path, services: dict[str, Any]) -> None:
    sources = [
        re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
        for service in services.values()
        for volume in service["volumes"]
    ]
    files = [source for source in sources if source.startswith(".")]
    assert "./prometheus.yml" in files
    # The demo writes this one.
    for source in set(files) - {"../demo-output"}:
        assert (root / "deploy" / source).is_file()


def test_the_server_is_given_settings_it_has(services: dict[str, Any]) -> None:
    environment = services["sluice"]["environment"]
    names = {name.removeprefix("SLUICE_").lower() for name in environment}
    assert names <= set(Settings.model_fields)
    models = dict(pair.split("=") for pair in environment["SLUICE_MODEL"].split(","))
    mounted = [volume.split(":")[-2] for volume in services["sluice"]["volumes"]]
    assert all(str(Path(path).parent) in mounted for path in models.values())


def test_a_graceful_stop_has_the_time_it_needs(services: dict[str, Any]) -> None:
    grace = int(services["sluice"]["stop_grace_period"].removesuffix("s"))
    assert grace > Settings.model_fields["drain_seconds_max"].default


def test_every_port_is_published_on_loopback_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service["ports"]]
    assert ports
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_prometheus_watches_the_server_where_it_listens(
    root: Path, services: dict[str, Any]
) -> None:
    configuration = yaml.safe_load((root / "deploy/prometheus.yml").read_text())
    (job,) = configuration["scrape_configs"]
    ((target,),) = [static["targets"] for static in job["static_configs"]]
    name, _, port = target.partition(":")
    assert name in services
    assert f"SLUICE_HTTP=0.0.0.0:{port}" in (root / "Dockerfile").read_text()
