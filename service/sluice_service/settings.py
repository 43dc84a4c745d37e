"""Every setting of the server, with its check beside it: built once, frozen, read by nobody else.

Flags are stronger than the environment (`SLUICE_…`), the environment is stronger
than the YAML file.
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
from yaml import YAMLError

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """What an operator can choose. Limits are named unit and qualifier last."""

    model_config = SettingsConfigDict(
        env_prefix="SLUICE_", frozen=True, extra="forbid", env_nested_delimiter=None
    )

    config: FilePath | None = Field(
        default=None,
        title="What is served",
        description="A YAML file of settings, by the names of these flags with underscores.",
    )
    model: Annotated[dict[str, Path], NoDecode] = Field(
        default={},
        title="What is served",
        description="A model to serve, as NAME=PATH; may be given again for more. "
        "In the environment: SLUICE_MODEL=NAME=PATH,NAME=PATH.",
    )
    model_repository: DirectoryPath | None = Field(
        default=None,
        title="What is served",
        description="A folder of models to serve, each as NAME/VERSION/model.onnx. The newest "
        "version that can be served is.",
    )
    model_control: Literal["none", "poll", "explicit"] = Field(
        default="none",
        title="What is served",
        description="How the repository is followed: read once at the start, looked at every "
        "repository_poll_seconds, or loaded and unloaded by clients alone.",
    )
    repository_poll_seconds: Seconds = Field(
        default=15,
        title="What is served",
        description="How often a repository is looked at with model_control poll.",
    )
    listen: str = Field(
        default="127.0.0.1:8001",
        title="What is served",
        description="HOST:PORT of the gRPC server. Port 0 takes a free one and logs it.",
    )
    http: str = Field(
        default="127.0.0.1:8002",
        title="What is served",
        description="HOST:PORT of /metrics, /healthz and /readyz.",
    )
    sequences_max: Count = Field(
        default=100_000,
        title="Sequences",
        description="Live sequences of one model. Beyond it new ones are refused, or wait as "
        "backlog_sequences_max says; none is evicted. Memory is taken only for sequences that "
        "live.",
    )
    backlog_sequences_max: Annotated[int, Field(ge=0)] = Field(
        default=1024,
        title="Sequences",
        description="New sequences of the Open Inference Protocol that may wait for one of the "
        "sequences_max places of their model. 0: all are refused at once, as those of other "
        "streams are.",
    )
    backlog_seconds_max: Seconds = Field(
        default=60,
        title="Sequences",
        description="How long they may wait; the timeout of a request may say less.",
    )
    sequence_idle_seconds_max: Seconds = Field(
        default=600,
        title="Sequences",
        description="A sequence without a step for this long is closed and its client told. "
        "Time in which this process was paused does not count.",
    )
    tombstone_seconds: Seconds = Field(
        default=600,
        title="Sequences",
        description="How long a closed sequence's id is remembered, so that a late repeat of "
        "its open cannot start it anew.",
    )
    non_finite: Literal["refuse", "allow"] = Field(
        default="refuse",
        title="Sequences",
        description="What becomes of a step with NaN or infinity in its input or new state: "
        "refused with the state as before, or let through.",
    )
    duplicate_start: Literal["restart", "refuse"] = Field(
        default="restart",
        title="Sequences",
        description="What the START flag of the Open Inference Protocol does to a sequence that "
        "is alive: begin it again from the initial state, or refuse.",
    )
    store: str = Field(
        default="memory",
        title="Durability",
        description="Where sequences outlive this process: memory (they do not), "
        "sqlite:///PATH (on this machine), redis://HOST:PORT (shared by many servers).",
    )
    durability: Literal["off", "periodic", "strict"] = Field(
        default="off",
        title="Durability",
        description="What of a sequence is in the store: nothing; its state, every so often; "
        "or everything that a client has seen. A client may ask for less.",
    )
    checkpoint_seconds: Seconds = Field(
        default=1,
        title="Durability",
        description="With periodic: a sequence that went on is stored after this long …",
    )
    checkpoint_steps: Count = Field(
        default=1024,
        title="Durability",
        description="… or after this many steps, whichever comes first.",
    )
    undurable_steps_max: Count = Field(
        default=65_536,
        title="Durability",
        description="Steps of one sequence that may be ahead of the store. Beyond it the "
        "sequence is not run further.",
    )
    record_seconds: Seconds = Field(
        default=86_400,
        title="Durability",
        description="How long the store keeps a sequence that no server says is alive.",
    )
    chunk_steps_max: Count = Field(
        default=100_000, title="Limits", description="Steps of one chunk."
    )
    request_bytes_max: Count = Field(
        default=64 * 2**20, title="Limits", description="Bytes of one message from a client."
    )
    stream_queue_steps_max: Count = Field(
        default=262_144,
        title="Limits",
        description="Steps of one stream that may wait to be run. "
        "Beyond it the server reads no further from that stream.",
    )
    stream_queue_bytes_max: Count = Field(
        default=128 * 2**20, title="Limits", description="The same, in bytes of inputs."
    )
    unacknowledged_steps_max: Count = Field(
        default=4096,
        title="Limits",
        description="Outputs of one sequence that are held until the client has them. "
        "Beyond it the sequence is not run further.",
    )
    unacknowledged_bytes_max: Count = Field(
        default=16 * 2**20, title="Limits", description="The same, in bytes of outputs."
    )
    run_sequences_max: Count = Field(
        default=1024, title="Runs", description="Sequences in one ONNX Runtime call."
    )
    run_steps_max: Count = Field(
        default=64,
        title="Runs",
        description="Steps of one sequence in one ONNX Runtime call; longer chunks are cut.",
    )
    run_seconds_max: Seconds = Field(
        default=0.01,
        title="Runs",
        description="How long one call may take, as estimated at load, before chunks are cut "
        "shorter so that single steps are not held up.",
    )
    runs_at_once_max: Count = Field(
        default=1,
        title="Runs",
        description="ONNX Runtime calls of one model at once, each on a core of its own.",
    )
    run_threads: Count = Field(
        default=1, title="Runs", description="Threads that one call may use inside an operator."
    )
    workers: Count = Field(
        default=1,
        title="Process",
        description="Server processes that share the port. More than one need a --store that "
        "they share, and a --durability: any of them may get a sequence's next stream.",
    )
    drain_seconds_max: Seconds = Field(
        default=25,
        title="Process",
        description="How long a graceful stop may take before what is left is cut off.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", title="Process", description="The least severe log line to write."
    )
    log_format: Literal["json", "console"] = Field(
        default="json", title="Process", description="JSON lines for machines, or text for eyes."
    )

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
        if self.workers > 1 and (self.durability == "off" or self.store == "memory"):
            raise ValueError(
                "--workers: a sequence of one worker is unknown to the others; give them "
                "--store sqlite:///PATH or redis://HOST and --durability periodic or strict"
            )
        if self.workers > 1 and self.model_control == "explicit":
            raise ValueError(
                "--model-control: what a client loads or unloads reaches one worker of several; "
                "serve with --workers 1, or --model-control poll"
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
        return init_settings, env_settings, _read(settings_cls, file)


def _read(settings_cls: type[BaseSettings], file: Any) -> YamlConfigSettingsSource:
    """The settings of a YAML file. Raises SettingsError when it has none to read."""
    try:
        return YamlConfigSettingsSource(settings_cls, yaml_file=file)
    except (YAMLError, TypeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"{file} is not YAML of settings, such as `sequences_max: 5000` ({reason})"
        ) from error
