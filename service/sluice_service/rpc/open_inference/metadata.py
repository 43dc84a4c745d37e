"""What the Open Inference Protocol tells of a model: tensors, configuration, figures."""

from collections.abc import Iterator

from sluice_protos.contract_pb2 import ModelContract, StatePart, TensorSpec
from sluice_protos.open_inference_pb2 import (
    TYPE_FP32,
    DataType,
    InferStatistics,
    ModelConfig,
    ModelInput,
    ModelMetadataResponse,
    ModelOutput,
    ModelSequenceBatching,
    ModelStatistics,
    ModelTensorReshape,
    ModelTransactionPolicy,
    RepositoryIndexResponse,
    StatisticDuration,
)
from sluice_service.metrics import ModelMetrics
from sluice_service.models.host import Host
from sluice_service.models.repository import Repository
from sluice_service.rpc.open_inference.refusals import Tally
from sluice_service.settings import Settings

PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
ANY_SIZE = -1

ModelIndex = RepositoryIndexResponse.ModelIndex
TensorMetadata = ModelMetadataResponse.TensorMetadata


def describe(host: Host) -> ModelMetadataResponse:
    """The tensors as one step has them, behind a batch of any size."""
    contract = host.contract
    return ModelMetadataResponse(
        name=host.name,
        versions=[str(version.number) for version in host.versions],
        platform=PLATFORM,
        inputs=[_tensor(spec) for spec in contract.inputs],
        outputs=[_tensor(spec) for spec in contract.outputs],
    )


def configure(name: str, contract: ModelContract, settings: Settings) -> ModelConfig:
    """The model as a configuration file of the field would have it."""
    idle_seconds = settings.sequence_idle_seconds_max
    return ModelConfig(
        name=name,
        platform=PLATFORM,
        backend=BACKEND,
        max_batch_size=settings.run_sequences_max,
        input=[
            ModelInput(
                name=spec.name,
                data_type=_data_type(spec.datatype),
                dims=_dims(spec),
                reshape=_reshape(spec),
            )
            for spec in contract.inputs
        ],
        output=[
            ModelOutput(
                name=spec.name,
                data_type=_data_type(spec.datatype),
                dims=_dims(spec),
                reshape=_reshape(spec),
            )
            for spec in contract.outputs
        ],
        sequence_batching=ModelSequenceBatching(
            max_sequence_idle_microseconds=round(idle_seconds * 1e6),
            oldest=ModelSequenceBatching.StrategyOldest(
                max_candidate_sequences=settings.sequences_max
            ),
            state=[_state(contract, part) for part in contract.state],
        ),
        model_transaction_policy=ModelTransactionPolicy(decoupled=False),
    )


def count(host: Host, metrics: ModelMetrics, tally: Tally) -> ModelStatistics:
    """What the model has done since the server started, all its versions together.

    Requests are those of this protocol; steps, runs and the time in them are those of
    every protocol, because they share runs. The three parts of computing count alike, once
    for each sequence in a run: putting it together, executing it, handing its outputs out.
    """
    queue = metrics.queue_seconds
    computed = round(metrics.run_sequences.sum)
    return ModelStatistics(
        name=host.name,
        version=str(host.version.number),
        last_inference=round(tally.last_time * 1e3),
        inference_count=metrics.steps.value,
        execution_count=metrics.runs.value,
        inference_stats=InferStatistics(
            success=_duration(tally.succeeded, tally.succeeded_seconds),
            fail=_duration(tally.failed, tally.failed_seconds),
            queue=_duration(sum(queue.counts), queue.sum),
            compute_input=_duration(computed, metrics.composing_seconds),
            compute_infer=_duration(computed, metrics.computed_seconds),
            compute_output=_duration(computed, metrics.delivering_seconds),
        ),
    )


def index(host: Host) -> Iterator[ModelIndex]:
    """The versions of a model that are loaded, as the list of all models has them."""
    for version in host.versions:
        state, reason = "READY", ""
        if host.is_draining:
            state, reason = "UNAVAILABLE", "the server is stopping"
        elif version is not host.version or not host.is_welcoming:
            state, reason = "UNLOADING", "its live sequences finish on it"
        yield ModelIndex(name=host.name, version=str(version.number), state=state, reason=reason)


def list_others(repository: Repository) -> Iterator[ModelIndex]:
    """What lies in the repository beside that, and why it is not served."""
    for entry in repository.entries():
        yield ModelIndex(
            name=entry.name, version=str(entry.version), state=entry.state, reason=entry.reason
        )


def _tensor(spec: TensorSpec) -> TensorMetadata:
    return TensorMetadata(name=spec.name, datatype=spec.datatype, shape=[ANY_SIZE, *_dims(spec)])


def _dims(spec: TensorSpec) -> list[int]:
    """A step's shape; a scalar is told as [1], which the protocol knows no other way to say."""
    return list(spec.shape) or [1]


def _reshape(spec: TensorSpec) -> ModelTensorReshape | None:
    return None if spec.shape else ModelTensorReshape()


def _data_type(datatype: str) -> "DataType.ValueType":
    return DataType.Value(f"TYPE_{datatype}")


def _state(contract: ModelContract, part: StatePart) -> ModelSequenceBatching.State:
    """A part of the state, under its own name: the graph packs all parts into one tensor."""
    dims = list(part.shape)
    initial = ModelSequenceBatching.InitialState(name=part.name, data_type=TYPE_FP32, dims=dims)
    if not any(part.initial):
        initial.zero_data = True
    else:
        initial.data_file = f"{contract.name}.onnx"  # the contract inside has the values
    return ModelSequenceBatching.State(
        input_name=part.name,
        output_name=part.name,
        data_type=TYPE_FP32,
        dims=dims,
        initial_state=[initial],
    )


def _duration(count: int, seconds: float) -> StatisticDuration:
    return StatisticDuration(count=count, ns=round(seconds * 1e9))
