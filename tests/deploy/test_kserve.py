"""kserve.yaml names what there is, and its command serves a repository as KServe lays it out."""

import copy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from sluice_protos.open_inference_pb2 import ModelReadyRequest
from sluice_protos.open_inference_pb2_grpc import GRPCInferenceServiceStub
from sluice_service.server import GRACE_SECONDS
from sluice_service.settings import Settings
from tests.deploy.described import Packages
from tests.processes import free_port, running

MOUNTED = "/mnt/models"  # where KServe puts what storageUri names


@pytest.fixture(scope="module")
def manifests(root: Path) -> dict[str, Any]:
    documents = yaml.safe_load_all((root / "deploy/kserve.yaml").read_text())
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def container(manifests) -> dict[str, Any]:
    (container,) = manifests["ServingRuntime"]["spec"]["containers"]
    return container


@pytest.fixture(scope="module")
def flags(container) -> dict[str, str]:
    return dict(argument.removeprefix("--").split("=") for argument in container["args"])


@pytest.fixture(scope="module")
def packages() -> Packages:
    """KServe's and Kubernetes' own description of their objects."""
    folder = Path(sys.prefix) / "objects"
    if not (folder / "kserve").is_dir():
        pytest.fail("this test reads KServe's models: `make tools` fetches them")
    return Packages(folder)


def misfits(packages: Packages, manifests: dict[str, Any]) -> Iterator[str]:
    for kind, manifest in manifests.items():
        version = manifest["apiVersion"].rpartition("/")[2]
        yield from packages.misfits(manifest, version.capitalize() + kind, kind)


def test_every_field_is_one_that_kserve_and_kubernetes_describe(manifests, packages) -> None:
    assert list(misfits(packages, manifests)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda spec: spec.update(autoSelect=True), "knows no autoSelect"),
        (lambda spec: spec.update(multiModel="no"), "multiModel is 'no', not bool"),
        (lambda spec: spec.pop("containers"), "wants containers"),
        (lambda spec: spec["containers"][0].update(livenessprobe={}), "knows no livenessprobe"),
        (lambda spec: spec["containers"][0]["ports"][0].pop("containerPort"), "wants container"),
        (lambda spec: spec["containers"][0].update(args="--help"), "not a list"),
    ],
)
def test_a_field_that_nobody_describes_would_be_found(manifests, packages, change, told) -> None:
    changed = copy.deepcopy(manifests)
    change(changed["ServingRuntime"]["spec"])
    (misfit,) = misfits(packages, changed)
    assert told in misfit


def test_kserve_finds_what_it_looks_for(manifests, container) -> None:
    runtime, service = (manifests[kind] for kind in ("ServingRuntime", "InferenceService"))
    assert runtime["apiVersion"] == "serving.kserve.io/v1alpha1"
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert container["name"] == "kserve-container"
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = [(one["name"], one["version"]) for one in runtime["spec"]["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]


def test_the_ports_are_those_the_server_listens_on(manifests, container, flags) -> None:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    grpc_port, http_port = (int(flags[flag].rpartition(":")[2]) for flag in ("listen", "http"))
    assert ports == {"grpc-port": grpc_port, "http": http_port}
    assert container["ports"][0]["name"] == "grpc-port"
    probes = ("startupProbe", "readinessProbe", "livenessProbe")
    assert {container[probe]["httpGet"]["port"] for probe in probes} == {http_port}
    annotations = manifests["ServingRuntime"]["spec"]["annotations"]
    assert annotations["prometheus.kserve.io/port"] == str(http_port)


def test_the_container_is_the_image_of_this_project(root, container) -> None:
    image = (root / "Dockerfile").read_text()
    user = container["securityContext"]["runAsUser"]
    assert f"USER {user}" in image
    program, *_ = container["command"]
    assert f'ENTRYPOINT ["{program}"]' in image


def test_a_graceful_stop_has_the_time_it_needs(manifests) -> None:
    grace = manifests["InferenceService"]["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace > Settings.model_fields["drain_seconds_max"].default + GRACE_SECONDS


def test_its_command_serves_the_models_of_the_folder(
    container, flags, model_file, tmp_path
) -> None:
    assert flags["model-repository"] == MOUNTED
    file = tmp_path / "lstm" / "3" / "model.onnx"
    file.parent.mkdir(parents=True)
    shutil.copy(model_file, file)
    listen, http = (f"127.0.0.1:{free_port()}" for _ in range(2))
    here = {**flags, "model-repository": str(tmp_path), "listen": listen, "http": http}
    program, *words = container["command"]
    command = [Path(sys.executable).with_name(program), *words]
    command += [f"--{name}={value}" for name, value in here.items()]
    ready = f"http://{http}{container['readinessProbe']['httpGet']['path']}"
    with running(command, ready=ready), grpc.insecure_channel(listen) as channel:
        question = ModelReadyRequest(name="lstm", version="3")
        assert GRPCInferenceServiceStub(channel).ModelReady(question, timeout=60).ready
