"""What the Open Inference Protocol tells of a model: tensors, configuration, figures."""

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
from sluice_service.host import Host
from sluice_service.metrics import ModelMetrics
from sluice_service.rpc.open_inference_lanes import Tally
from sluice_service.rpc.open_inference_requests import VERSION
from sluice_service.settings import Settings

PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
ANY_SIZE = -1

TensorMetadata = ModelMetadataResponse.TensorMetadata


def describe(name: str, contract: ModelContract) -> ModelMetadataResponse:
    """The tensors as one step has them, behind a batch of any size."""
    return ModelMetadataResponse(
        name=name,
        versions=[VERSION],
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


def count(name: str, metrics: ModelMetrics, tally: Tally) -> ModelStatistics:
    """What the model has done since the server started.

    Requests are those of this protocol; steps, runs and the time in them are those of
    every protocol, because they share runs. Clients expect the three parts of computing
    to count alike; only the run itself is timed.
    """
    queue = metrics.queue_seconds
    computed = round(metrics.run_sequences.sum)
    return ModelStatistics(
        name=name,
        version=VERSION,
        last_inference=round(tally.last_time * 1e3),
        inference_count=metrics.steps.value,
        execution_count=metrics.runs.value,
        inference_stats=InferStatistics(
            success=_duration(tally.succeeded, tally.succeeded_seconds),
            fail=_duration(tally.failed, tally.failed_seconds),
            queue=_duration(sum(queue.counts), queue.sum),
            compute_input=_duration(computed, 0),
            compute_infer=_duration(computed, metrics.computed_seconds),
            compute_output=_duration(computed, 0),
        ),
    )


def index(host: Host) -> RepositoryIndexResponse.ModelIndex:
    """The model as the list of all models has it."""
    is_ready = host.is_welcoming
    return RepositoryIndexResponse.ModelIndex(
        name=host.name,
        version=VERSION,
        state="READY" if is_ready else "UNAVAILABLE",
        reason="" if is_ready else "the server is stopping",
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
