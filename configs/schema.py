"""The typed configuration of a run. A default lives here (of recipes: in ``schema_recipes``) and nowhere else; YAML
files hold choices only.

Every class is a frozen keyword-only dataclass, so a config that was loaded cannot drift during the run. The
comment above a key is its documentation; ``loom3d config keys`` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from configs.schema_recipes import RecipeConfig as RecipeConfig
from configs.schema_recipes import Spa3rConfig as Spa3rConfig
from configs.schema_recipes import Spa3VlmConfig as Spa3VlmConfig
from configs.schema_recipes import UniuggConfig as UniuggConfig
from configs.schema_recipes import ViewSetConfig as ViewSetConfig


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    # Absolute folder that holds runs, caches and generated data; "~" is expanded at load. A run on several nodes needs
    # one that all of them see (a shared file system, a mounted bucket).
    root: str = "~/loom3d"


@dataclass(frozen=True, kw_only=True)
class RoomsConfig:
    # Number of procedural rooms; split 70/15/15 (at least one each) by generator version and seed.
    scenes: int = 24
    # Views along each camera path.
    views: int = 8
    # Width of the images, pixels.
    width: int = 160
    # Height of the images, pixels.
    height: int = 120
    # Seed of the first room; room i uses (seed, i).
    seed: int = 0
    # Folder of images to use as textures; "" uses procedural ones.
    textures: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    # Reader: rooms | scannet | scannetpp | arkitscenes | re10k | nerfstudio | colmap | sevenscenes | images | corpus |
    # questions (about the scenes of the source options.of; made on demand) | benchmark (options.name says which).
    format: str = "rooms"
    # Folder or file of the source; "" for rooms means a folder under storage.root made on demand.
    root: str = ""
    # Relative share of samples drawn from this source.
    weight: float = 1.0
    # Take every n-th frame of a sequence.
    frame_stride: int = 1
    # Smallest and largest distance of neighbouring views of a view set, in frames that frame_stride leaves; [] takes
    # recipe.view_set.interval. Frame rates differ from source to source.
    interval: list[int] = field(default_factory=list)
    # Use at most this many scenes or items (0: all).
    limit: int = 0
    # File with one scene id a line for each split, as {"train": path, ...}; {} uses the source's own split,
    # or a stable split by hash of the scene id where it has none.
    splits: dict[str, str] = field(default_factory=dict)
    # Options that only this reader knows (documented in its module).
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    # Seed of the choice of objects, wrong options and letters.
    seed: int = 0
    # At most this many questions of each type for one scene.
    per_scene: int = 8
    # At most this many views, evenly spaced, belong to a question.
    max_views: int = 32
    # An object is visible in a view that it fills to at least this share of the pixels.
    min_visible: float = 0.002


@dataclass(frozen=True, kw_only=True)
class ChecksConfig:
    # A view must share at least this part of its pixels with some other view of the scene.
    min_overlap: float = 0.05
    # Least plausible median depth of a view, metres.
    min_depth: float = 0.1
    # Largest plausible median depth of a view, metres.
    max_depth: float = 30.0
    # Two pictures whose 64-bit perceptual hashes differ in at most this many bits are near-duplicates.
    duplicate_bits: int = 1
    # Threads that read and check files.
    threads: int = 4


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    # Two views are a pair when each sees at least this share of the other's known pixels, unoccluded ...
    min_overlap: float = 0.25
    # ... and at most this share (nearly equal views teach nothing).
    max_overlap: float = 0.95
    # At most this many pairs of one scene, spread evenly over the overlap (0: all; a scene of a thousand views has tens
    # of thousands, and measuring them takes minutes).
    per_scene: int = 0
    # Depth maps are thinned to this many pixels along the longer side before they are compared.
    side: int = 48


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    # Jitter of brightness, contrast, saturation and hue, drawn for each view by itself; [0,0,0,0] is none. The
    # published training has [0.5,0.5,0.5,0.1].
    jitter: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    # Crops tried for each view of a pair, of which the pair with most correspondences is kept (0: the centre crop).
    crops: int = 0
    # Smallest crop, as a share of each side of the largest window of that shape that fits into the picture.
    min_crop: float = 0.1
    # Probability that a pair is replaced by the same picture twice.
    same_image: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    # Tokenizer: "bytes" (built in code, a few hundred entries), a local folder, or a hub name.
    tokenizer: str = "bytes"
    # Longest sequence in tokens, image tokens among them; a longer conversation is a broken sample.
    max_length: int = 2048
    # System message put before a conversation that has none; "" for the template's own.
    system: str = ""
    # What is supervised of an assistant's turn: answer (its text and the token that ends it) | turn (also the white
    # space that the template writes behind that token; a line break in ChatML).
    supervise: str = "answer"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    # Where samples come from, by a name of your choice.
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    # The procedural scenes that a source of format rooms makes when it has no root.
    rooms: RoomsConfig = field(default_factory=RoomsConfig)
    # Broken samples are quarantined and counted; the run ends when more than this share of all samples broke.
    max_broken: float = 0.01
    # File of sample or scene ids to leave out, as written by `loom3d data check`; "" for none.
    quarantine: str = ""
    # Scenes that must not be trained on: name -> file with their ids (a list, one a line; a benchmark's own .json,
    # .jsonl or .parquet; a .csv of splits), or a folder of such files. Benchmarks among the sources are sets anyway.
    evaluation_sets: dict[str, str] = field(default_factory=dict)
    # Evaluation sets, or sources of format benchmark, whose scenes training data may hold all the same.
    allow_leak: list[str] = field(default_factory=list)
    # Questions made from the instances of a scene (`loom3d data questions`).
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    # Which views of a scene make a pair (`loom3d data pairs`).
    pairs: PairsConfig = field(default_factory=PairsConfig)
    # Random changes of the pictures that a trained network reads; features of a frozen encoder are then not cached.
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    # From conversations to tokens.
    text: TextConfig = field(default_factory=TextConfig)
    # What `loom3d data check` calls a fault.
    checks: ChecksConfig = field(default_factory=ChecksConfig)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    # Family: dinov2 | dinov3 | radio | siglip2 | clip (images), siglip2_text | clip_text (texts),
    # pooled | projection (records of another encoder), uniugg_vit | mast3r | vggt_patches | qwen2_5_vl (images),
    # uniugg_vae | uniugg_reconstruction (records of uniugg_vit), vggt (sets of views, from records of vggt_patches),
    # spa3r (records of vggt).
    family: str = "dinov2"
    # "random" (initialised from `seed`), a local folder, a hub name, or "run:NAME/PART" (a part that the
    # run of that name trained).
    weights: str = "random"
    # sha256 that the weights must have ("" accepts any); a run pins it, so that weights which change while it runs are
    # refused in whatever process loads them.
    digest: str = ""
    # Overrides of the architecture when weights=random (hidden_size, num_hidden_layers, ...). With any weights of VGGT:
    # depth_map (false leaves its depth head and output out) and qk_norm (that the weights must have).
    arch: dict[str, Any] = field(default_factory=dict)
    # Seed of random weights.
    seed: int = 0
    # Input height in pixels; a multiple of the patch size.
    height: int = 224
    # Input width in pixels; a multiple of the patch size.
    width: int = 224
    # [height, width] of the shape whose largest central window is read and stretched to the input's size, so that two
    # encoders of different shapes see the same part of a picture; [] is the input's own shape.
    window: list[int] = field(default_factory=list)
    # Pixels that the width of a picture of any shape is brought to, its height following; of that the part that is
    # multiples of the patch is read, so that records have grids of their own, and `height` and `width` are what a plan
    # reckons with (qwen2_5_vl); 0 reads all pictures at one size.
    side: int = 0
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
    # GPUs of one replica (its num_cpus is 0; the role resource decides placement).
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
    # A shard is sealed when it reaches this many bytes ...
    shard_bytes: int = 256 * 2**20
    # ... or this many seconds after its first record.
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
    # Weights that parts of the model start from: part -> "random", a folder, a hub name, or "run:NAME/PART" (a part
    # that the run of that name trained). A part that is not named starts at random.
    init: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    # Optimiser steps of the run.
    steps: int = 200
    # Samples of one global micro-batch; the world size must divide it.
    micro_batch: int = 8
    # Micro-batches of one optimiser step.
    accumulation: int = 1
    # Peak learning rate of AdamW.
    lr: float = 1e-3
    # Learning rate at the end of the cosine, as a share of the peak.
    min_lr_ratio: float = 0.0
    # Steps of linear warm-up.
    warmup_steps: int = 10
    # Decoupled weight decay of AdamW.
    weight_decay: float = 0.0
    # Decay rates of AdamW's two moments.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    # Glob of parameter names -> factor on the learning rate of those parameters; the first that fits counts.
    lr_scale: dict[str, float] = field(default_factory=dict)
    # Gradient norm clipped to this, per role (0: not clipped).
    clip_norm: float = 1.0
    # float32 | bfloat16 (autocast; weights and optimiser stay float32).
    precision: str = "float32"
    # Recompute activations in the backward pass instead of keeping them.
    activation_checkpointing: bool = False
    # Decay of the exponential moving average of the weights (0: none).
    ema: float = 0.0
    # Steps that may be skipped for a non-finite loss or gradient before the run ends.
    max_skipped_steps: int = 10
    # Save every n steps (0: only at the end).
    checkpoint_every: int = 50
    # Keep this many of the newest checkpoints, and the best one.
    keep_checkpoints: int = 2
    # Validate every n steps (0: only at the end).
    validate_every: int = 50
    # Metric of validation that selects the best checkpoint.
    best_metric: str = "loss"
    # Whether the best value of that metric is its smallest or its largest: min | max.
    best_mode: str = "min"
    # Print and record metrics every n steps.
    log_every: int = 10
    # Torch threads of a trainer process on CPU (0 leaves torch's default).
    threads: int = 0
    # Steps that the loader prepares ahead.
    prefetch_steps: int = 2
    # Steps that plan rows and requests for missing features run ahead of the trainer (with Ray); half of them travel
    # together, so a larger number costs Ray less a step.
    lookahead_steps: int = 64
    # Resume from the newest valid checkpoint of a run folder of the same name: auto | never.
    resume: str = "auto"


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    # How a role's weights and gradients are spread: single | ddp | fsdp2 | zero2 | zero3.
    name: str = "ddp"
    # Smallest parameter that ZeRO-3 partitions, in elements (DeepSpeed's stage3_param_persistence_threshold).
    persistence_threshold: int = 100_000
    # Free the gathered weights of FSDP2 after the forward pass and gather them again for the backward pass.
    reshard_after_forward: bool = True
    # What ZeRO keeps in the host's memory: none | optimizer (its weights, moments and gradients; zero2 and zero3) |
    # parameters (that, and each rank's part of the weights; zero3).
    offload: str = "none"


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    # none | lora.
    method: str = "none"
    # Rank of the low-rank update.
    rank: int = 8
    # The update is scaled by alpha / rank (see peft.rslora).
    alpha: float = 16.0
    # Dropout before the update.
    dropout: float = 0.0
    # Train the length of each row of an adapted weight beside its direction, which the update turns (DoRA).
    dora: bool = False
    # Scale the update by alpha / sqrt(rank) instead (rsLoRA).
    rslora: bool = False
    # Names of the modules that get an update; [] takes those that the model's spec names.
    targets: list[str] = field(default_factory=list)
    # In what the frozen weights of an adapted network are kept while training: auto | stored | float32 | bfloat16.
    # stored: bfloat16 where they are published in it and read by parts (model.init.language of spa3_vlm), else float32.
    # auto: bfloat16 on a GPU with trainer.precision=bfloat16, else stored.
    base_dtype: str = "auto"


@dataclass(frozen=True, kw_only=True)
class RoleOverrides:
    # Backend of this role ("": backend.name).
    backend: str = ""
    # Low-rank updates of this role: none | lora ("": peft.method).
    peft: str = ""
    # Modules of this role that get a low-rank update ([]: peft.targets).
    targets: list[str] = field(default_factory=list)
    # Settings of `trainer` that are different for this role, e.g. {lr: 1e-4, weight_decay: 0.01, precision: bfloat16};
    # what decides the steps of a run (steps, micro_batch, accumulation, every ...) is common to all roles.
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    # What carries activations and gradients between roles: auto (in-process inline, a process group in a split run) |
    # local | group | objects (Ray's object store).
    transport: str = "auto"
    # Micro-batches that the sending role may be ahead of the gradients that come back.
    window: int = 2
    # A rank says this often, in seconds, what it is doing.
    heartbeat_s: float = 2.0
    # Seconds without a sign of life after which a peer is given up.
    silence_s: float = 20.0
    # Longest time, in seconds, that a peer may stay in a phase (start, load, forward, backward, step, validate,
    # checkpoint) before it is given up; `other` is for those not named.
    phase_s: dict[str, float] = field(
        default_factory=lambda: {
            "start": 900.0,
            "load": 900.0,
            "validate": 7200.0,
            "checkpoint": 3600.0,
            "other": 900.0,
        }
    )
    # Time-out of the transport itself, seconds; long, because a process group does not survive one.
    timeout_s: float = 86400.0


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    # Steps of DDIM.
    steps: int = 50
    # Classifier-free guidance; 1 is none.
    guidance: float = 1.0
    # DDIM's eta: 0 is deterministic, 1 draws as DDPM does.
    eta: float = 0.0
    # Points of at least this confidence are kept.
    confidence: float = 1.5
    # Radius of a drawn point, pixels at a width of 224 (scaled with the width).
    radius: float = 1.0
    # Holes of up to this many pixels are filled with their nearest neighbour.
    fill: int = 2
    # Which points are drawn into the target view: target | union (reference and target).
    points: str = "target"
    # Longest answer, tokens, but for benchmarks that publish a limit of their own (options.max_new_tokens of a source).
    max_new_tokens: int = 64
    # Views imagined, and questions answered, at once.
    batch_size: int = 8
    # Horizontal field of view, degrees, of a picture whose intrinsics are not known.
    fov: float = 60.0
    # Frames of a trajectory (`--trajectory`).
    frames: int = 24
    # A trajectory turns by so many degrees to either side, where no angle is given.
    angle: float = 30.0
    # Frames a second of the animation of a trajectory.
    frame_rate: float = 8.0


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    # Samples of the split that are judged (0: all).
    samples: int = 0
    # Folder or file of the AlexNet trunk that LPIPS needs ("": LPIPS is not reported).
    lpips_weights: str = ""
    # File with Inception weights that FID and KID need ("": neither is reported).
    inception_weights: str = ""
    # Folder of DINOv2 weights for FD-DINOv2, which is not FID ("": not reported).
    dinov2_weights: str = ""
    # Seed of the draws of evaluation.
    seed: int = 0
    # Upper ends, in degrees, of the bins of the angle between two views.
    angle_bins: list[float] = field(default_factory=lambda: [15.0, 30.0, 60.0])
    # Upper ends, in metres, of the bins of the distance between two views.
    distance_bins: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    # Workers of this role; [n] is fixed, [min, max] is elastic.
    workers: list[int] = field(default_factory=lambda: [1])
    # CPUs that one worker reserves (0: the role resource alone decides placement).
    num_cpus: float = 0.0
    # GPUs of one worker.
    num_gpus: float = 0.0
    # Host memory that one worker reserves, GB (0: none).
    memory_gb: float = 0.0
    # Accelerator type as Ray names it; "" for any.
    accelerator: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    # Nodes of this kind.
    count: int = 1
    # CPUs of one node.
    num_cpus: float = 2.0
    # GPUs of one node.
    num_gpus: float = 0.0
    # Host memory of one node, GB.
    memory_gb: float = 24.0
    # Memory of one GPU, GB.
    gpu_memory_gb: float = 0.0
    # Accelerator type as Ray names it; "" for none.
    accelerator: str = ""
    # Custom resources, e.g. the roles that this kind of node may hold: {"role_feature": 4}.
    resources: dict[str, float] = field(default_factory=dict)
    # Rate at which one worker computes, for the time that `loom3d plan` expects: TFLOP/s that a network reaches there,
    # not the peak of the hardware. Two CPU cores with AVX-512 reach about 0.05 in float32.
    tflops: float = 0.05
    # Rate at which one worker reads stored features, GB/s, for the same purpose.
    read_gb_s: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    # inline (no Ray) | local (a Ray of our own on loopback) | attach (a running cluster at `address`).
    mode: str = "local"
    # Address of a running cluster for mode=attach ("auto" inside a job).
    address: str = ""
    # Nodes that `plan` packs the roles onto, and that mode=local pretends to have.
    nodes: dict[str, NodeConfig] = field(default_factory=lambda: {"local": NodeConfig()})
    # Worker groups by role. An option of the group cluster may say "*" for all roles of the recipe.
    roles: dict[str, RoleConfig] = field(default_factory=lambda: {"trainer": RoleConfig()})
    # Restarts of a failed worker group before the run ends.
    max_failures: int = 3
    # Seconds to wait for a worker group to start.
    start_timeout_s: float = 60.0
    # Bytes of Ray's object store in mode=local.
    object_store_bytes: int = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    # Write TensorBoard files into the run folder.
    tensorboard: bool = True
    # Weights & Biases project ("" for none); needs the extra `wandb`.
    wandb: str = ""
    # MLflow tracking URI ("" for none); needs the extra `mlflow`.
    mlflow: str = ""
    # Progress line on the terminal: auto (when it is one) | plain | off.
    progress: str = "auto"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    # Name of the run folder under <storage.root>/runs; "" is <recipe>-<size>.
    name: str = ""
    # Size of the recipe: tiny | small | paper; decides encoder, model and data sizes.
    size: str = "tiny"
    # Seed of everything random: weights, plan, draws.
    seed: int = 0
    # Where runs, caches and generated data live.
    storage: StorageConfig = field(default_factory=StorageConfig)
    # What is trained, on which kinds of sample.
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    # Where samples come from.
    data: DataConfig = field(default_factory=DataConfig)
    # What is trained, by its name in the registry.
    model: ModelConfig = field(default_factory=ModelConfig)
    # Frozen encoders by name; `recipe.features` says which one feeds the probe, UniUGG's recipes look for `teacher`,
    # `vit`, `vae` and `reconstruction`.
    encoders: dict[str, EncoderConfig] = field(default_factory=dict)
    # Actors that run the frozen encoders.
    service: ServiceConfig = field(default_factory=ServiceConfig)
    # Store of what the encoders computed.
    cache: CacheConfig = field(default_factory=CacheConfig)
    # Optimisation, validation, checkpoints.
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    # How weights and gradients are spread over a role's workers.
    backend: BackendConfig = field(default_factory=BackendConfig)
    # Low-rank updates of a pretrained model.
    peft: PeftConfig = field(default_factory=PeftConfig)
    # What is different for single roles of a model of several.
    roles: dict[str, RoleOverrides] = field(default_factory=dict)
    # What connects the roles of a model of several.
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    # How scenes and answers are generated.
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    # How a trained model is judged.
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    # Nodes, worker groups, and how Ray is found.
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    # Where progress and metrics go.
    logger: LoggerConfig = field(default_factory=LoggerConfig)
