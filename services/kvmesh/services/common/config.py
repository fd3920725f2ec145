"""Everything that can be set, with its default; mesh.toml has the same names.

The launcher resolves one MeshConfig and hands it to each process as JSON; a process takes its own
part by its member id.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvmesh.services.common.errors import ConfigError

Port = Annotated[int, Field(ge=0, le=65535)]  # 0: any free one
Role = Literal["prefill", "decode", "both"]
CodecName = Literal["k4v4", "k4v3", "k3v3", "k3v2", "k2v2", "k8v8", "fp16", "fp32"]


class Section(BaseModel):
    """A table of mesh.toml: immutable, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    name: str = "mini"
    path: Path | None = None  # a Hugging Face checkpoint folder; none: the bundled model
    codec: Literal["auto", CodecName] = "auto"  # auto: see services.common.codec_choice
    layer_codecs: tuple[CodecName, ...] = ()  # a codec for each layer, instead of `codec`
    codec_check: Path | None = None  # none: kvmesh-codec.json in the checkpoint folder

    @model_validator(mode="after")
    def _one_choice(self) -> "ModelConfig":
        if self.layer_codecs and self.codec != "auto":
            raise ValueError("codec and layer_codecs are both set; take one of the two")
        return self


class SecurityConfig(Section):
    cert: Path | None = None  # PEM files
    key: Path | None = None
    ca: Path | None = None
    token_file: Path | None = None  # KVMESH_TOKEN in the environment wins
    keys_file: Path | None = None  # API keys of tenants; see common.api_keys


class RouterConfig(Section):
    port: Port = 50051  # the public Inference service
    mesh_port: Port = 0  # membership, for the mesh's own processes
    max_active: Annotated[int, Field(ge=1)] = 256  # requests in the mesh at once
    max_waiting_s: Annotated[float, Field(gt=0)] = 30.0  # predicted queue time that is still taken
    lease_s: Annotated[float, Field(gt=0.1)] = 3.0
    index_bytes: Annotated[int, Field(ge=1 << 16)] = 256 << 20
    handover_min_tokens: Annotated[int, Field(ge=0)] = 256  # uncached; below, decode does both
    handover_patience: Annotated[float, Field(gt=0)] = 2.0  # times as slow as without, still taken
    max_migrations: Annotated[int, Field(ge=0)] = 3
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0


class TokenizerConfig(Section):
    port: Port = 0
    threads: Annotated[int, Field(ge=1)] = 2
    cache_bytes: Annotated[int, Field(ge=0)] = 64 << 20
    max_text_bytes: Annotated[int, Field(ge=1)] = 4 << 20


class KvCacheConfig(Section):
    shards: Annotated[int, Field(ge=0)] = 2
    max_bytes: Annotated[int, Field(ge=1 << 20)] = 256 << 20  # per shard
    backend: Literal["cpu", "cuda"] = "cpu"  # cuda: in the GPU's memory, what is over in main
    device_bytes: Annotated[int, Field(ge=1 << 20)] | None = None  # of max_bytes; none: all
    replicas: Annotated[int, Field(ge=1)] = 1


class SimulateConfig(Section):
    """What a simulated backend's device is; empty: what the backend's name says."""

    device: str = ""  # a device's name ('kvmesh devices list') or a file of your own
    count: Annotated[int, Field(ge=1)] = 1  # devices that act as one
    model: str = ""  # a model's shape whose steps are timed; the tokens stay those of the mesh's
    weights: str = "bf16"  # format of its weights
    ffn_device: str = ""  # another device that runs each layer's FFN; `device` does the rest


class WorkerConfig(Section):
    role: Role = "both"
    count: Annotated[int, Field(ge=1)] = 1
    backend: str = "cpu"
    price_usd_per_hour: Annotated[float, Field(ge=0)] | None = None  # of one device; none: its own
    port: Port = 0
    blocks: Annotated[int, Field(ge=1)] | None = None  # none: half of the free memory, bounded
    slots: Annotated[int, Field(ge=1)] = 64  # sequences that run at once
    max_waiting: Annotated[int, Field(ge=1)] = 256
    step_tokens: Annotated[int, Field(ge=64)] = 512  # most tokens of one step
    prefill_chunk: Annotated[int, Field(ge=1)] = 256  # most prompt tokens while others decode
    threads: Annotated[int, Field(ge=1)] = 1
    spin: bool = False
    simulate: SimulateConfig = SimulateConfig()


class GatewayConfig(Section):
    """The edges: OpenAI's API over HTTP, and the Open Inference Protocol over gRPC."""

    enabled: bool = True
    port: Port | None = None  # none: 8080, or any free one if that is taken
    oip: bool = True
    oip_port: Port | None = None  # none: 8001, or any free one if that is taken
    max_body_bytes: Annotated[int, Field(ge=1 << 10, le=7 << 20)] = 4 << 20
    max_head_bytes: Annotated[int, Field(ge=1 << 10)] = 64 << 10  # request line and headers
    max_connections: Annotated[int, Field(ge=1)] = 1024
    head_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    write_timeout_s: Annotated[float, Field(gt=0)] = 30.0  # a client that does not read


class TelemetryConfig(Section):
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    metrics: bool = True  # a Prometheus endpoint on loopback for each process
    metrics_port: Port = 0  # of the router; the other members, in order, have the next ones
    traces: bool = True  # the embedded receiver and its store
    traces_port: Port = 0
    traces_max_bytes: Annotated[int, Field(ge=1 << 20)] = 256 << 20
    traces_max_age_s: Annotated[float, Field(gt=0)] = 7 * 86_400.0
    otlp: Literal["join", "replace"] = "join"  # what OTEL_EXPORTER_OTLP_ENDPOINT does to the store


class MeshConfig(Section):
    """A whole mesh. `workers` is written as [[workers]] tables."""

    host: str = "127.0.0.1"
    model: ModelConfig = ModelConfig()
    security: SecurityConfig = SecurityConfig()
    router: RouterConfig = RouterConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    kvcache: KvCacheConfig = KvCacheConfig()
    gateway: GatewayConfig = GatewayConfig()
    workers: Annotated[tuple[WorkerConfig, ...], Field(min_length=1)] = (
        WorkerConfig(role="prefill"),
        WorkerConfig(role="decode"),
    )
    telemetry: TelemetryConfig = TelemetryConfig()


def load_config(path: Path | None) -> MeshConfig:
    """The mesh of `path`, or the built-in one. Raises ConfigError naming the file and the key."""
    if path is None:
        return MeshConfig()
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], source: str) -> MeshConfig:
    """Raises ConfigError with one line per wrong key, each with the nearest right one."""
    try:
        return MeshConfig.model_validate(data)
    except ValidationError as error:
        lines = [_explain(dict(e)) for e in error.errors(include_url=False)]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from error


def _explain(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where} = {error['input']!r}: {error['msg']}"
    known = list(_section_at(error["loc"][:-1]).model_fields)
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key '{where}', {hint}"


def _section_at(path: tuple[str | int, ...]) -> type[Section]:
    if not path:
        return MeshConfig
    if path[0] == "workers":
        return WorkerConfig
    annotation = MeshConfig.model_fields[str(path[0])].annotation
    return annotation if isinstance(annotation, type) else MeshConfig
