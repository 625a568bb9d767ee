"""The configuration: one frozen dataclass per group of knobs, and all that is known of each knob.

Everything outside `kdjax.config` sees these dataclasses only. A knob carries its meaning, its choices or range and
whether a run may be resumed with another value; `kdjax train --help` prints the first two, `validate` checks them.
NeMo-Aligner's names are kept where it has one.
"""

import dataclasses
import json
import typing
from collections.abc import Collection
from typing import Any

from kdjax.losses.dispatch import IMPLEMENTATIONS
from kdjax.losses.objective import KD_LOSSES, TAILS, TARGETS
from kdjax.parallel.axes import AXES


@dataclasses.dataclass(frozen=True)
class Knob:
    """What is known of a knob besides its name, type and default."""

    meaning: str
    choices: Collection[str] | None = None
    above: float | None = None  # exclusive lower bound
    low: float | None = None  # inclusive lower bound
    high: float | None = None  # inclusive upper bound
    below: float | None = None  # exclusive upper bound
    why: str | None = None  # said instead of the bound when a value is out of range
    resumable: bool = False  # whether a run directory may be resumed with another value


def knob(default: Any, meaning: str, **known: Any) -> Any:
    """Returns a dataclass field with a `Knob` as its metadata."""
    return dataclasses.field(default=default, metadata={"knob": Knob(meaning, **known)})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The student's architecture and arithmetic. 0 and None mean "not given"."""

    init_from: str | None = knob(None, "converted checkpoint or run to start from; its architecture overrides model.*")
    keep_layers: tuple[int, ...] | None = knob(
        None, "layers of init_from to keep, in this order, counted from 0, such as 0-11,18-29; None: all"
    )
    layers: int = knob(
        0, "number of transformer layers", above=0, why="set it, or model.init_from to a converted checkpoint"
    )
    d_model: int = knob(0, "width of the residual stream", above=0)
    n_heads: int = knob(0, "query heads per layer", above=0)
    n_groups: int | None = knob(None, "key/value heads per layer (grouped queries); None: n_heads", above=0)
    head_dim: int | None = knob(None, "width of one head; None: d_model / n_heads", above=0)
    d_ff: int = knob(0, "width of the MLP", above=0)
    vocab_size: int = knob(0, "true vocabulary size: token ids run from 0 to vocab_size - 1", above=0)
    padded_vocab_size: int | None = knob(None, "stored rows of embedding and unembedding; None: vocab_size", above=0)
    position: str = knob("rope", "position encoding", choices=("rope", "learned"))
    max_positions: int | None = knob(None, "number of learned positions; None: data.sequence_length", above=0)
    rope_theta: float = knob(10000.0, "base of the rotary frequencies", above=0)
    rope_fraction: float = knob(1.0, "leading share of each head's width that is rotated", low=0, high=1)
    rope_linear_factor: float = knob(1.0, "divides all rotary frequencies (linear scaling)", above=0)
    rope_llama3: tuple[float, ...] | None = knob(
        None, "Llama 3's scaling of the rotary frequencies: factor, low, high, original positions; None: no scaling"
    )
    norm: str = knob(
        "rmsnorm", "normalisation; 1p stores the scale minus one", choices=("rmsnorm", "layernorm", "layernorm_1p")
    )
    norm_eps: float = knob(1e-5, "added to the variance in every norm", above=0)
    activation: str = knob(
        "swiglu", "activation of the MLP; gelu is exact", choices=("swiglu", "gelu", "gelu_tanh", "squared_relu")
    )
    bias: bool = knob(False, "biases on every linear map (norms have theirs either way)")
    qkv_bias: bool = knob(False, "biases on query, key and value only (Qwen2)")
    qk_norm: bool = knob(False, "RMSNorm on each query and key head (Qwen3)")
    tied: bool = knob(True, "use the embedding as the unembedding")
    init_std: float = knob(0.02, "standard deviation of the initial weights", above=0)
    scaled_init: bool = knob(True, "divide init_std by sqrt(2 layers) where a layer writes to the residual stream")
    dtype: str = knob("bfloat16", "dtype of activations and matmuls", choices=("bfloat16", "float32"))
    param_dtype: str = knob("float32", "dtype of the master weights", choices=("float32", "bfloat16"))
    remat: str = knob(
        "layer", "what the backward pass recomputes; dots: all but matmuls", choices=("none", "dots", "layer")
    )
    attention: str | None = knob(
        None, "attention kernel; None: cudnn where it can run, else xla", choices=("xla", "cudnn")
    )
    tokenizer_sha256: str | None = knob(None, "digest of the tokenizer file, compared with the data's manifest")

    @property
    def groups(self) -> int:
        """Key/value heads per layer (G)."""
        return self.n_groups or self.n_heads

    @property
    def head_width(self) -> int:
        """Width of one head (H)."""
        return self.head_dim or self.d_model // max(self.n_heads, 1)

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and unembedding, padding included."""
        return self.padded_vocab_size or self.vocab_size


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Records of teacher logits. A path may be a file, a glob, or a template whose file name contains CHUNK_ID."""

    train: tuple[str, ...] = knob((), "training records: comma-separated paths (.jsonl, .jsonl.gz, .jsonl.zst)")
    val: tuple[str, ...] = knob((), "validation records; empty: no validation")
    sequence_length: int = knob(
        0,
        "tokens per row; shorter records are padded with loss mask 0",
        above=0,
        why="set it to the length the records were made with",
    )
    top_k: int | None = knob(None, "teacher entries used per position, largest first; None: all stored", above=0)
    shuffle: bool = knob(True, "shuffle every epoch anew; False: file order, cyclic")
    seed: int = knob(1234, "seed of the order", low=0)
    pack: bool = knob(False, "pack several short records into a row, kept apart by segment ids")
    over_long: str = knob("error", "records longer than sequence_length", choices=("error", "drop", "truncate"))
    n_chunks: int | None = knob(None, "files that data.train's CHUNK_ID template must match; None: any number", above=0)
    n_examples_per_chunk: int | None = knob(
        None, "records that each chunk of data.train must hold; None: any number", above=0
    )
    kind: str = knob(
        "logits", "what topk_logits holds; logits may be shifted", choices=("logits", "log_probs", "probs")
    )
    teacher_temperature: float = knob(1.0, "temperature that the stored logits were already divided by", above=0)
    strict: bool = knob(False, "refuse unsorted rows and duplicate ids instead of repairing them")
    weighted_mask: bool = knob(False, "allow loss_mask values between 0 and 1")
    dedupe: bool = knob(False, "keep only the last of the records with the same index (an appended re-run)")
    allow_truncated: bool = knob(False, "drop a last record that was cut off instead of refusing the file")
    max_bad_records: int = knob(0, "damaged records that may be left out before the run stops", low=0)
    verify_records: int = knob(256, "records of each set to check in full at the start, spread evenly; -1: all", low=-1)
    scratch_dir: str | None = knob(
        None, "where indices and decompressed files are kept; None: the system's temporary directory", resumable=True
    )
    read_threads: int = knob(2, "threads that read and parse records", above=0, resumable=True)
    prefetch: int = knob(4, "batches prepared ahead of the step", above=0, resumable=True)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Batch sizes, in rows (sequences)."""

    global_size: int = knob(128, "rows per step, over all devices", above=0)
    microbatch_size: int = knob(1, "rows that a device computes at once", above=0, resumable=True)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective: kd_loss_weight * kd + sft_loss_weight * sft (`kdjax.losses.topk_kd_loss` has the details)."""

    kd_loss: str = knob("fwd_kl", "divergence from teacher to student", choices=KD_LOSSES)
    kd_loss_weight: float = knob(1.0, "weight of the distillation term")
    sft_loss_weight: float = knob(0.0, "weight of the cross-entropy with the labels")
    logits_scale: float = knob(1.0, "multiplies the student's logits in both terms (1 / temperature)")
    target_logits_scale: float = knob(1.0, "multiplies the teacher's logits (1 / temperature)")
    cross_tokenizer: str | bool | None = knob(
        None, "rank_match: compare sorted top-k values and ignore the teacher's ids", choices=("rank_match",)
    )
    tail: str = knob(
        "renormalize",
        "mass outside the top-k; renormalize: dropped, ghost: one more bucket, label: given to the label",
        choices=TAILS,
    )
    targets: str = knob(
        "topk",
        "what the entries are; topk: the teacher's largest, sampled: draws with weights, for the whole vocabulary's KL",
        choices=TARGETS,
    )
    jsd_beta: float = knob(0.5, "weight of the teacher in jsd's mixture, strictly between 0 and 1")
    reduction: str = knob(
        "token", "token: mean over the global batch's tokens, nemo: mean of microbatch means", choices=("token", "nemo")
    )
    implementation: str | None = knob(
        None,
        "code that computes the loss; gathered: without an SFT term; None: the fastest that can run",
        choices=IMPLEMENTATIONS,
    )
    include_vocab_padding: bool = knob(False, "include the padded vocabulary rows in the softmax, as Megatron does")


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """A teacher that runs beside the student on the same mesh, in place of cached entries."""

    checkpoint: str | None = knob(None, "converted checkpoint or run of the teacher; None: the records' cached entries")
    dtype: str = knob(
        "bfloat16", "dtype of the teacher's parameters, activations and matmuls", choices=("bfloat16", "float32")
    )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning rate. Defaults are NeMo-Aligner's."""

    name: str = knob("adamw", "optimiser", choices=("adamw", "lion", "sgd"))
    lr: float = knob(3e-5, "peak learning rate", above=0)
    min_lr: float = knob(9e-7, "final learning rate of cosine and wsd", low=0)
    schedule: str = knob(
        "cosine",
        "learning-rate schedule; cosine: NeMo's CosineAnnealing, wsd: warm up, hold, decay",
        choices=("cosine", "constant", "wsd"),
    )
    warmup_steps: int = knob(10, "steps of linear warm-up", low=0)
    constant_steps: int = knob(
        0, "cosine: steps held at min_lr at the end; wsd: steps held at lr before the decay", low=0
    )
    b1: float = knob(0.9, "decay of the first moment (momentum for sgd)", low=0, below=1)
    b2: float = knob(0.98, "decay of the second moment", low=0, below=1)
    eps: float = knob(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = knob(0.01, "decoupled weight decay", low=0)
    decay_rule: str = knob(
        "megatron",
        "parameters exempt from decay; megatron: biases and norms, nemo: biases",
        choices=("megatron", "nemo"),
    )
    clip_norm: float | None = knob(
        1.0, "global norm that gradients are clipped to; None: no clipping", above=0, why="None turns clipping off"
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = knob(0, "number of updates", above=0, why="set the number of updates")
    val_every: int = knob(100, "steps between validations; the last step always validates", above=0)
    val_batches: int | None = knob(None, "global batches per validation; None: the whole set", above=0)
    save_every: int = knob(100, "steps between checkpoints; the last step always saves", above=0)
    log_every: int = knob(1, "steps between lines of metrics.jsonl", above=0, resumable=True)
    seed: int = knob(0, "seed of the initial weights", low=0)
    early_stop_patience: int | None = knob(
        None, "validations without improvement before stopping; None: never stop early", above=0
    )
    max_skipped_steps: int = knob(8, "non-finite steps in a row, each skipped, before the run stops", above=0)
    wandb_project: str | None = knob(None, "Weights & Biases project to log to as well", resumable=True)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh. One size may be -1: all devices that are left."""

    pipe: int = knob(1, "pipeline stages: devices that each hold some of the layers", resumable=True)
    data: int = knob(
        -1, "data-parallel replicas with whole parameters; they share the optimiser state (ZeRO-1)", resumable=True
    )
    fsdp: int = knob(1, "data-parallel replicas that also shard the parameters (ZeRO-3)", resumable=True)
    tensor: int = knob(1, "devices that split each layer; keep them in one host", resumable=True)
    interleave: int = knob(
        1, "runs of layers per stage (v): more give a smaller bubble and more sends", above=0, resumable=True
    )
    schedule: str = knob(
        "1f1b",
        "pipeline schedule; gpipe keeps an input of every microbatch",
        choices=("1f1b", "gpipe"),
        resumable=True,
    )

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each mesh axis, by its name."""
        return {axis: getattr(self, axis) for axis in AXES}


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The checkpoints kept in RUN/checkpoints."""

    keep_last: int = knob(2, "newest checkpoints kept", above=0, resumable=True)
    keep_best: int = knob(1, "best checkpoints kept as well, by best_metric; 0: none", low=0, resumable=True)
    best_metric: str = knob(
        "loss",
        "validation metric to keep and stop by",
        choices=("loss", "kd_loss", "sft_loss"),
        resumable=True,
    )


@dataclasses.dataclass(frozen=True)
class ResumeConfig:
    """Resuming a run directory."""

    allow_data_change: bool = knob(False, "resume although the data or batch.global_size changed", resumable=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run needs, group by group."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()

    def __getitem__(self, dotted: str) -> Any:
        group, key = dotted.split(".")
        return getattr(getattr(self, group), key)


GROUPS: dict[str, type] = typing.get_type_hints(Config)
KNOBS: dict[str, Knob] = {
    f"{group}.{field.name}": field.metadata["knob"]
    for group, cls in GROUPS.items()
    for field in dataclasses.fields(cls)
}
TYPES: dict[str, Any] = {
    f"{group}.{name}": kind for group, cls in GROUPS.items() for name, kind in typing.get_type_hints(cls).items()
}


def replace(config: Config, **changes: Any) -> Config:
    """Returns a copy with knobs replaced, written with a double underscore: `replace(c, optim__lr=1e-3)`."""
    for name, value in changes.items():
        group, key = name.split("__")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{key: value})})
    return config


def flatten(config: Config) -> dict[str, Any]:
    """Returns {dotted key: value}, in the order of the dataclasses."""
    return {dotted: config[dotted] for dotted in KNOBS}


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Returns (dotted key, old value, new value) for every knob that differs."""
    return [(k, v, new[k]) for k, v in flatten(old).items() if v != new[k]]


def to_json(config: Config) -> str:
    """Returns the configuration as indented JSON, the content of RUN/config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
