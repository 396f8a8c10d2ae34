"""The typed configuration of a run. A default lives here and nowhere else; YAML files hold choices only.

Every class is a frozen keyword-only dataclass, so a config that was loaded cannot drift during the run. The
comment above a key is its documentation; ``loom3d config keys`` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    # Absolute folder or URI that holds runs, caches and generated data; "~" is expanded at load.
    root: str = "~/loom3d"


@dataclass(frozen=True, kw_only=True)
class RoomsConfig:
    # Number of procedural rooms; split 70/15/15 (at least one each) by generator version and seed.
    scenes: int = 24
    # Views along each camera path.
    views: int = 8
    # Image size in pixels (width, height).
    width: int = 160
    height: int = 120
    # Seed of the first room; room i uses (seed, i).
    seed: int = 0
    # Folder of images to use as textures; "" uses procedural ones.
    textures: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    # Reader: rooms | scannet | scannetpp | arkitscenes | re10k | nerfstudio | colmap | sevenscenes | images | corpus.
    format: str = "rooms"
    # Folder or file of the source; "" for rooms means a folder under storage.root made on demand.
    root: str = ""
    # Relative share of samples drawn from this source.
    weight: float = 1.0
    # Take every n-th frame of a sequence.
    frame_stride: int = 1
    # Use at most this many scenes or items (0: all).
    limit: int = 0
    # File with one scene id a line for each split, as {"train": path, ...}; {} uses the source's own split,
    # or a stable split by hash of the scene id where it has none.
    splits: dict[str, str] = field(default_factory=dict)
    # Options that only this reader knows (documented in its module).
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    rooms: RoomsConfig = field(default_factory=RoomsConfig)
    # Broken samples are quarantined and counted; the run ends when more than this share of all samples broke.
    max_broken: float = 0.01
    # File of sample or scene ids to leave out, as written by `loom3d data check`; "" for none.
    quarantine: str = ""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    # Family: dinov2 | dinov3 | radio | siglip2 | clip.
    family: str = "dinov2"
    # "random" (initialised from `seed`), a local folder, or a hub name.
    weights: str = "random"
    # Overrides of the architecture when weights=random (hidden_size, num_hidden_layers, ...).
    arch: dict[str, Any] = field(default_factory=dict)
    # Seed of random weights.
    seed: int = 0
    # Input size in pixels; a multiple of the patch size.
    height: int = 224
    width: int = 224
    # Layers whose patch tokens are kept, counted from 1; [] keeps the last only.
    layers: list[int] = field(default_factory=list)
    # Compute and storage dtype: float32 | bfloat16 | float16.
    dtype: str = "bfloat16"
    # Name of the encoder (key under `encoders`) whose records this one reads; "" for none.
    upstream: str = ""
    # Images a forward pass.
    batch_size: int = 16


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    # Encoder actors; 0 encodes in the trainer's process.
    replicas: int = 1
    # Seconds that a micro-batch waits for more inputs of the same shape.
    batch_wait_s: float = 0.005
    # Requests a replica queues before it refuses more.
    queue: int = 256
    # Seconds before an unanswered request goes to another replica, then to the local fallback.
    deadline_s: float = 60.0
    # Seconds that an encoder's lease on a key lasts.
    lease_s: float = 120.0
    # Resources of one replica (num_cpus is 0; the role resource decides placement).
    num_gpus: float = 0.0
    # Release replicas when the hit rate of the last epoch is at least this.
    release_at: float = 0.995
    # Threads of one replica on CPU; 0 leaves torch's default.
    threads: int = 0


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    # always | never | auto (measures reading against encoding and says "do not cache" with both figures).
    mode: str = "always"
    # Folder of the node-local tier; "" is <storage.root>/cache.
    root: str = ""
    # Folder on a shared file system or URI (s3://..., gs://...) of the remote tier; "" for none.
    remote: str = ""
    # Which reads are checked against their checksum: always | first_touch | off.
    verify: str = "always"
    # Bytes that the local tier may use (0: no limit).
    budget_bytes: int = 0
    # A shard is sealed at this size, or `seal_s` seconds after its first record.
    shard_bytes: int = 256 * 2**20
    seal_s: float = 2.0
    # none | fp8_e4m3 (per-token scale; its error is reported).
    codec: str = "none"
    # Bytes of features that may be requested ahead for one consumer.
    lookahead_bytes: int = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    # Name in the model registry (see `loom3d models`).
    name: str = "probe-tiny"
    # Overrides passed to the model's builder.
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    name: str = "probe"
    # Relative share of micro-batches of each kind in every step (largest remainder).
    quotas: dict[str, float] = field(default_factory=lambda: {"view": 1.0})
    # Loss terms and their weights.
    losses: dict[str, float] = field(default_factory=dict)
    # Which encoder (key under `encoders`) feeds the model.
    features: str = "features"
    # Settings that only this recipe knows (documented in its spec).
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    steps: int = 200
    # Samples of one global micro-batch; the world size must divide it.
    micro_batch: int = 8
    # Micro-batches of one optimiser step.
    accumulation: int = 1
    lr: float = 1e-3
    min_lr_ratio: float = 0.0
    warmup_steps: int = 10
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    # Gradient norm clipped to this, per role (0: not clipped).
    clip_norm: float = 1.0
    # float32 | bfloat16 (autocast; weights and optimiser stay float32).
    precision: str = "float32"
    activation_checkpointing: bool = False
    # Decay of the exponential moving average of the weights (0: none).
    ema: float = 0.0
    # Steps that may be skipped for a non-finite loss or gradient before the run ends.
    max_skipped_steps: int = 10
    # Save every n steps (0: only at the end), keep the newest n and the best.
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    # Validate every n steps (0: only at the end).
    validate_every: int = 50
    # Metric of validation that selects the best checkpoint, and whether lower is better ("min" | "max").
    best_metric: str = "loss"
    best_mode: str = "min"
    # Print and record metrics every n steps.
    log_every: int = 10
    # Torch threads of a trainer process on CPU (0 leaves torch's default).
    threads: int = 0
    # Steps that the loader prepares ahead.
    prefetch_steps: int = 2
    # Resume from the newest valid checkpoint of a run folder of the same name: auto | never.
    resume: str = "auto"


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    # How a role's weights and gradients are spread: single | ddp (later: fsdp2, zero2, zero3).
    name: str = "ddp"


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    # none | lora.
    method: str = "none"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    # Workers of this role; [n] is fixed, [min, max] is elastic.
    workers: list[int] = field(default_factory=lambda: [1])
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    memory_gb: float = 0.0
    # Accelerator type as Ray names it; "" for any.
    accelerator: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    count: int = 1
    num_cpus: float = 2
    num_gpus: float = 0
    memory_gb: float = 24
    gpu_memory_gb: float = 0
    accelerator: str = ""
    # Custom resources, e.g. the roles that this kind of node may hold: {"role_feature": 4}.
    resources: dict[str, float] = field(default_factory=dict)
    # Measured or assumed rates that `loom3d plan` uses for time: dense TFLOP/s in the compute dtype.
    tflops: float = 0.05


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    # inline (no Ray) | local (a Ray of our own on loopback) | attach (a running cluster at `address`).
    mode: str = "local"
    # Address of a running cluster for mode=attach ("auto" inside a job).
    address: str = ""
    # Nodes that `plan` packs the roles onto, and that mode=local pretends to have.
    nodes: dict[str, NodeConfig] = field(default_factory=lambda: {"local": NodeConfig()})
    roles: dict[str, RoleConfig] = field(default_factory=lambda: {"trainer": RoleConfig()})
    # Restarts of a failed worker group before the run ends.
    max_failures: int = 3
    # Seconds to wait for a worker group to start.
    start_timeout_s: float = 60.0
    # Bytes of Ray's object store in mode=local.
    object_store_bytes: int = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    tensorboard: bool = True
    # Weights & Biases project ("" off) and MLflow tracking URI ("" off); need the extras of the same name.
    wandb: str = ""
    mlflow: str = ""
    # Progress line on the terminal: auto (when it is one) | plain | off.
    progress: str = "auto"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    # Name of the run folder under <storage.root>/runs; "" is <recipe>-<size>.
    name: str = ""
    size: str = "tiny"
    seed: int = 0
    storage: StorageConfig = field(default_factory=StorageConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    encoders: dict[str, EncoderConfig] = field(default_factory=dict)
    service: ServiceConfig = field(default_factory=ServiceConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
