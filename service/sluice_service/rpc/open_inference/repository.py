"""Answers the calls about the model repository: index, load, unload."""

from collections.abc import Iterator, Mapping

from sluice_protos import open_inference_pb2 as pb
from sluice_service.errors import RepositoryError, RequestError
from sluice_service.models.host import Host
from sluice_service.models.repository import Entry, Repository

ModelIndex = pb.RepositoryIndexResponse.ModelIndex


class RepositoryControl:
    """The repository calls, which a server without a repository refuses."""

    def __init__(self, hosts: Mapping[str, Host], repository: Repository | None) -> None:
        self._hosts = hosts
        self._repository = repository

    async def index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """Every version of every model: the loaded ones, then the others in the repository."""
        entries = [entry for host in self._hosts.values() for entry in _loaded(host)]
        if self._repository is not None:
            entries += map(_not_loaded, self._repository.entries())
        return pb.RepositoryIndexResponse(
            models=[entry for entry in entries if entry.state == "READY" or not request.ready]
        )

    async def load(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """Load a model's newest version."""
        if request.parameters:
            raise RequestError(
                f"parameters {sorted(request.parameters)} are unknown here: a model is what "
                "lies in the repository"
            )
        await self._require_repository().load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def unload(
        self, request: pb.RepositoryModelUnloadRequest
    ) -> pb.RepositoryModelUnloadResponse:
        """Begin no more sequences of a model. Live ones finish."""
        await self._require_repository().unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _require_repository(self) -> Repository:
        if self._repository is None:
            raise RepositoryError(
                "this server has no repository: its models are named with --model; serve a folder "
                "of them with --model-repository DIR and --model-control explicit"
            )
        return self._repository


def _loaded(host: Host) -> Iterator[ModelIndex]:
    """The loaded versions of one model."""
    for version in host.versions:
        state, reason = "READY", ""
        if host.is_draining:
            state, reason = "UNAVAILABLE", "the server is stopping"
        elif version is not host.version or not host.is_welcoming:
            state, reason = "UNLOADING", "its live sequences finish on it"
        yield ModelIndex(name=host.name, version=str(version.number), state=state, reason=reason)


def _not_loaded(entry: Entry) -> ModelIndex:
    """A version in the repository that is not served, with the reason."""
    return ModelIndex(
        name=entry.name, version=str(entry.version), state=entry.state, reason=entry.reason
    )
