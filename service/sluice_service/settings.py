"""Declares and checks every setting of the server; the result is frozen.

Flags override the environment (`SLUICE_…`), and the environment overrides the YAML file.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import DirectoryPath, Field, FilePath, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """What an operator can set. Limits are named with the unit and the qualifier last."""

    model_config = SettingsConfigDict(
        env_prefix="SLUICE_", frozen=True, extra="forbid", env_nested_delimiter=None
    )

    config: FilePath | None = Field(
        default=None,
        title="What is served",
        description="A YAML file with settings. Its keys are the names of these flags without "
        "the leading dashes and with underscores, such as sequences_max.",
    )
    model: Annotated[dict[str, Path], NoDecode] = Field(
        default={},
        title="What is served",
        description="A model to serve, as NAME=PATH. Repeat the flag to serve several. In the "
        "environment: SLUICE_MODEL=NAME=PATH,NAME=PATH.",
    )
    model_repository: DirectoryPath | None = Field(
        default=None,
        title="What is served",
        description="A folder of models to serve, each as NAME/VERSION/model.onnx. The "
        "highest version that loads is served.",
    )
    model_control: Literal["none", "poll", "explicit"] = Field(
        default="none",
        title="What is served",
        description="When changes in the model repository take effect: none reads it once, at "
        "the start; poll reads it every --repository-poll-seconds; explicit loads and unloads "
        "only what clients ask for.",
    )
    repository_poll_seconds: Seconds = Field(
        default=15,
        title="What is served",
        description="Seconds between two reads of the model repository with --model-control poll.",
    )
    listen: str = Field(
        default="127.0.0.1:8001",
        title="What is served",
        description="HOST:PORT of the gRPC server. Port 0 takes a free port and logs it.",
    )
    http: str = Field(
        default="127.0.0.1:8002",
        title="What is served",
        description="HOST:PORT of the HTTP pages /metrics, /healthz and /readyz.",
    )
    sequences_max: Count = Field(
        default=100_000,
        title="Sequences",
        description="Live sequences of one model. Beyond this limit new sequences are "
        "refused, or wait as --backlog-sequences-max allows. No live sequence is evicted. "
        "Only live sequences use memory.",
    )
    backlog_sequences_max: Annotated[int, Field(ge=0)] = Field(
        default=1024,
        title="Sequences",
        description="New sequences of the Open Inference Protocol that may wait for one of "
        "the --sequences-max places of their model. 0 refuses them at once, as new sequences of "
        "Sluice's own protocol always are.",
    )
    backlog_seconds_max: Seconds = Field(
        default=60,
        title="Sequences",
        description="How long a new sequence may wait in the backlog. The timeout of a "
        "request may shorten this.",
    )
    sequence_idle_seconds_max: Seconds = Field(
        default=600,
        title="Sequences",
        description="A sequence without a step for this long is closed, and its client is "
        "told. Time during which this process was paused does not count.",
    )
    tombstone_seconds: Seconds = Field(
        default=600,
        title="Sequences",
        description="How long the id of a closed sequence is remembered, so that a late retry "
        "of its open cannot start it again.",
    )
    non_finite: Literal["refuse", "allow"] = Field(
        default="refuse",
        title="Sequences",
        description="What happens to a step with NaN or infinity in its input or in its new "
        "state: refuse reports an error and leaves the state unchanged, allow lets it "
        "through.",
    )
    duplicate_start: Literal["restart", "refuse"] = Field(
        default="restart",
        title="Sequences",
        description="What the START flag of the Open Inference Protocol does to a sequence "
        "that is already live: restart it from the initial state, or refuse the request.",
    )
    store: str | None = Field(
        default=None,
        title="Durability",
        description="Where sequences are stored so that they outlive this process: "
        "sqlite:///PATH (a file, shared by the processes of this machine) or "
        "redis://HOST:PORT (shared by servers of many machines). Without a store sequences "
        "end with the process.",
    )
    durability: Literal["off", "periodic", "strict"] = Field(
        default="off",
        title="Durability",
        description="What is stored of each sequence: nothing (off), its state every "
        "--checkpoint-seconds or --checkpoint-steps (periodic), or every step before its "
        "output is sent (strict). A client may ask for less. "
        "With --store the default is periodic.",
    )
    checkpoint_seconds: Seconds = Field(
        default=1,
        title="Durability",
        description="With --durability periodic: write a checkpoint of a sequence at most this "
        "long after it has advanced.",
    )
    checkpoint_steps: Count = Field(
        default=1024,
        title="Durability",
        description="With --durability periodic: write a checkpoint after this many steps, "
        "even before --checkpoint-seconds have passed.",
    )
    undurable_steps_max: Count = Field(
        default=65_536,
        title="Durability",
        description="Steps of one sequence that may be missing from the store, with periodic "
        "and strict durability. Beyond this limit the sequence waits until the store has "
        "caught up.",
    )
    record_seconds: Seconds = Field(
        default=86_400,
        title="Durability",
        description="How long the store keeps a live sequence whose lease no server renews. "
        "Servers renew the leases of their sequences by themselves.",
    )
    chunk_steps_max: Count = Field(
        default=100_000,
        title="Limits",
        description="Steps of one chunk. Longer chunks are refused.",
    )
    request_bytes_max: Count = Field(
        default=64 * 2**20,
        title="Limits",
        description="Bytes of one message from a client. Larger messages are refused.",
    )
    stream_queue_steps_max: Count = Field(
        default=262_144,
        title="Limits",
        description="Steps of one stream that may wait to be run. Beyond this limit the "
        "server reads nothing more from that stream until some have run.",
    )
    stream_queue_bytes_max: Count = Field(
        default=128 * 2**20,
        title="Limits",
        description="Bytes of inputs of one stream that may wait to be run. Beyond this limit "
        "the server reads nothing more from that stream until some have run.",
    )
    unacknowledged_steps_max: Count = Field(
        default=4096,
        title="Limits",
        description="Steps of one sequence whose outputs the client has not acknowledged. "
        "Beyond this limit the sequence waits until the client has acknowledged some.",
    )
    unacknowledged_bytes_max: Count = Field(
        default=16 * 2**20,
        title="Limits",
        description="Bytes of outputs of one sequence that the client has not acknowledged. "
        "Beyond this limit the sequence waits until the client has acknowledged some.",
    )
    run_sequences_max: Count = Field(
        default=1024, title="Runs", description="Sequences in one ONNX Runtime call."
    )
    run_steps_max: Count = Field(
        default=64,
        title="Runs",
        description="Steps of one sequence in one ONNX Runtime call. Longer chunks are cut.",
    )
    run_seconds_max: Seconds = Field(
        default=0.01,
        title="Runs",
        description="How long one ONNX Runtime call may take, as estimated when the model is "
        "loaded. Chunks are cut so that calls stay below it and short chunks do not wait "
        "behind long ones.",
    )
    runs_at_once_max: Count = Field(
        default=1,
        title="Runs",
        description="ONNX Runtime calls of one model that may run at the same time, each on "
        "its own core.",
    )
    run_threads: Count = Field(
        default=1,
        title="Runs",
        description="Threads that one ONNX Runtime call may use inside an operator.",
    )
    workers: Count = Field(
        default=1,
        title="Process",
        description="Server processes that share the port. More than one needs --store, "
        "because any of them may get the next stream of a sequence.",
    )
    drain_seconds_max: Seconds = Field(
        default=25,
        title="Process",
        description="How long a graceful stop may take before the remaining work is cancelled.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", title="Process", description="The least severe log lines to write."
    )
    log_format: Literal["json", "console"] = Field(
        default="json",
        title="Process",
        description="json writes one JSON object a line, console writes text for a terminal.",
    )

    @model_validator(mode="before")
    @classmethod
    def _use_the_store(cls, values: Any) -> Any:
        """With a store, the default durability is periodic."""
        if isinstance(values, dict) and values.get("store"):
            return {"durability": "periodic", **values}
        return values

    @field_validator("model", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """Accept `NAME=PATH` strings beside a mapping."""
        if isinstance(value, str):
            value = value.split(",")
        if isinstance(value, list | tuple):
            pairs = dict[str, str]()
            for item in value:
                name, separator, path = str(item).partition("=")
                if not separator or not name or not path:
                    raise ValueError(f"{item!r} is not NAME=PATH, such as lstm=models/lstm.onnx")
                if name in pairs:
                    raise ValueError(f"two models are called {name!r}; names must differ")
                pairs[name] = path
            return pairs
        return value

    @field_validator("listen", "http")
    @classmethod
    def _address(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"{value!r} is not HOST:PORT, such as 127.0.0.1:8001")
        return value

    @model_validator(mode="after")
    def _workers_share(self) -> Self:
        if self.workers > 1 and (self.durability == "off" or self.store is None):
            raise ValueError(
                "--workers: several workers share their sequences through a store; name one with "
                "--store sqlite:///PATH or redis://HOST:PORT, and use --durability periodic or "
                "strict"
            )
        if self.workers > 1 and self.model_control == "explicit":
            raise ValueError(
                "--model-control: a client's load or unload reaches only one worker of several; "
                "use --workers 1 or --model-control poll"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file that either of them names."""
        file = init_settings().get("config") or env_settings().get("config")
        flags_and_environment = init_settings, env_settings
        if file is None:
            return flags_and_environment
        return *flags_and_environment, _read(settings_cls, file)


def _read(settings_cls: type[BaseSettings], file: Any) -> YamlConfigSettingsSource:
    """The settings of a YAML file. Raises SettingsError if it cannot be read as one."""
    from yaml import YAMLError  # noqa: PLC0415 - few servers have a file

    try:
        return YamlConfigSettingsSource(settings_cls, yaml_file=file)
    except (YAMLError, TypeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"{file} is not YAML of settings, such as `sequences_max: 5000` ({reason})"
        ) from error
