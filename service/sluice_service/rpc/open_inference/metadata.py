"""Answers calls about the server and its models: readiness, tensors, statistics."""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TypeVar

from sluice_protos import open_inference_pb2 as pb
from sluice_protos.contract_pb2 import ModelContract, StatePart, TensorSpec
from sluice_service.metrics import Metrics, ModelMetrics
from sluice_service.models.host import Host
from sluice_service.rpc.open_inference.inference import Inference, ServedModel
from sluice_service.settings import Settings

EXTENSIONS = ("model_configuration", "sequence", "sequence(string_id)", "statistics")
REPOSITORY_EXTENSION = "model_repository"
PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
ANY_SIZE = -1

TensorMetadata = pb.ModelMetadataResponse.TensorMetadata
TensorConfig = TypeVar("TensorConfig", pb.ModelInput, pb.ModelOutput)


class Metadata:
    """The calls that ask about the server or a model."""

    def __init__(
        self,
        hosts: Mapping[str, Host],
        inference: Inference,
        settings: Settings,
        metrics: Metrics,
        is_ready: Callable[[], bool],
        *,
        has_repository: bool,
    ) -> None:
        self._hosts = hosts
        self._inference = inference
        self._settings = settings
        self._metrics = metrics
        self._is_ready = is_ready
        self._extensions = (*EXTENSIONS, REPOSITORY_EXTENSION) if has_repository else EXTENSIONS

    async def server_live(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """True, because it answers."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        """True from the first readiness until the server stops."""
        return pb.ServerReadyResponse(ready=self._is_ready())

    async def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """True if sequences may begin on the model, in the requested version."""
        host = self._hosts.get(request.name)
        may_begin = (
            host is not None
            and host.is_welcoming
            and request.version in ("", str(host.version.number))
        )
        return pb.ModelReadyResponse(ready=may_begin and self._is_ready())

    async def server_metadata(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """Name, version, extensions."""
        return pb.ServerMetadataResponse(
            name="sluice", version=version("sluice-serving"), extensions=self._extensions
        )

    async def model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """The tensors of one step, with a leading batch axis of any size."""
        host = self._inference.find(request.name, request.version).host
        return pb.ModelMetadataResponse(
            name=host.name,
            versions=[str(version.number) for version in host.versions],
            platform=PLATFORM,
            inputs=[_tensor(spec) for spec in host.contract.inputs],
            outputs=[_tensor(spec) for spec in host.contract.outputs],
        )

    async def model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """The model as a Triton model configuration."""
        host = self._inference.find(request.name, request.version).host
        return pb.ModelConfigResponse(config=_configure(host.name, host.contract, self._settings))

    async def model_statistics(
        self, request: pb.ModelStatisticsRequest
    ) -> pb.ModelStatisticsResponse:
        """The statistics of one model or of all."""
        find = self._inference.find
        chosen = [find(request.name, request.version)] if request.name else map(find, self._hosts)
        return pb.ModelStatisticsResponse(
            model_stats=[_count(model, self._metrics.model(model.host.name)) for model in chosen]
        )


def _configure(name: str, contract: ModelContract, settings: Settings) -> pb.ModelConfig:
    idle_seconds = settings.sequence_idle_seconds_max
    return pb.ModelConfig(
        name=name,
        platform=PLATFORM,
        backend=BACKEND,
        max_batch_size=settings.run_sequences_max,
        input=[_tensor_config(pb.ModelInput, spec) for spec in contract.inputs],
        output=[_tensor_config(pb.ModelOutput, spec) for spec in contract.outputs],
        sequence_batching=pb.ModelSequenceBatching(
            max_sequence_idle_microseconds=round(idle_seconds * 1e6),
            oldest=pb.ModelSequenceBatching.StrategyOldest(
                max_candidate_sequences=settings.sequences_max
            ),
            state=[_state(contract, part) for part in contract.state],
        ),
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
    )


def _count(model: ServedModel, metrics: ModelMetrics) -> pb.ModelStatistics:
    """The statistics of a model since the server started, for all its versions together.

    Requests are those of this protocol; steps, runs and the time in them are those of
    both protocols, because they share runs. The three parts of a run are each counted once
    for each sequence in it: composing it, executing it, and delivering its outputs.
    """
    queue = metrics.queue_seconds
    computed = round(metrics.run_sequences.sum)
    return pb.ModelStatistics(
        name=model.host.name,
        version=str(model.host.version.number),
        last_inference=round(model.last_time * 1e3),
        inference_count=metrics.steps.value,
        execution_count=metrics.runs.value,
        inference_stats=pb.InferStatistics(
            success=_duration(model.succeeded, model.succeeded_seconds),
            fail=_duration(model.failed, model.failed_seconds),
            queue=_duration(sum(queue.counts), queue.sum),
            compute_input=_duration(computed, metrics.composing_seconds),
            compute_infer=_duration(computed, metrics.computed_seconds),
            compute_output=_duration(computed, metrics.delivering_seconds),
        ),
    )


def _tensor(spec: TensorSpec) -> TensorMetadata:
    return TensorMetadata(name=spec.name, datatype=spec.datatype, shape=[ANY_SIZE, *_dims(spec)])


def _dims(spec: TensorSpec) -> list[int]:
    """A step's shape. A scalar is [1], because the protocol has no scalars."""
    return list(spec.shape) or [1]


def _tensor_config(kind: type[TensorConfig], spec: TensorSpec) -> TensorConfig:
    return kind(
        name=spec.name,
        data_type=pb.DataType.Value(f"TYPE_{spec.datatype}"),
        dims=_dims(spec),
        reshape=None if spec.shape else pb.ModelTensorReshape(),
    )


def _state(contract: ModelContract, part: StatePart) -> pb.ModelSequenceBatching.State:
    """A part of the state under its own name. The graph packs all parts into one tensor."""
    dims = list(part.shape)
    initial = pb.ModelSequenceBatching.InitialState(
        name=part.name, data_type=pb.TYPE_FP32, dims=dims
    )
    if not any(part.initial):
        initial.zero_data = True
    else:
        initial.data_file = f"{contract.name}.onnx"  # the contract inside has the values
    return pb.ModelSequenceBatching.State(
        input_name=part.name,
        output_name=part.name,
        data_type=pb.TYPE_FP32,
        dims=dims,
        initial_state=[initial],
    )


def _duration(count: int, seconds: float) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=count, ns=round(seconds * 1e9))
