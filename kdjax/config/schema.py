"""The configuration: frozen dataclasses, filled from a `ConfigDict` and the command line, checked once.

Everything below this module sees these dataclasses only; `ml_collections` ends here. Each knob carries the
sentence that `python -m kdjax.train --help` prints. NeMo-Aligner's names stay where it has one.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from kdjax.types import UserError


def knob(default: Any, meaning: str, *, resumable: bool = False) -> Any:
    """A field with its meaning. `resumable` ones may change when a run directory is taken up again."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "resumable": resumable})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The student's architecture and arithmetic. 0 and None stand for "not given"."""

    init_from: str | None = knob(None, "converted checkpoint to start from; its architecture then rules")
    keep_layers: tuple[int, ...] | None = knob(
        None, "layers of init_from to keep, in this order, counted from 0: 0-11,18-29; None: all"
    )
    layers: int = knob(0, "number of transformer layers")
    d_model: int = knob(0, "width of the residual stream")
    n_heads: int = knob(0, "query heads a layer")
    n_groups: int | None = knob(None, "key/value heads a layer (grouped queries); None: n_heads")
    head_dim: int | None = knob(None, "width of one head; None: d_model / n_heads")
    d_ff: int = knob(0, "width of the MLP")
    vocab_size: int = knob(0, "true vocabulary: ids run from 0 to vocab_size - 1")
    padded_vocab_size: int | None = knob(None, "stored rows of embedding and unembedding; None: vocab_size")
    position: str = knob("rope", "rope | learned")
    max_positions: int | None = knob(None, "learned positions stored; None: data.sequence_length")
    rope_theta: float = knob(10000.0, "base of the rotary frequencies")
    rope_fraction: float = knob(1.0, "leading share of each head's width that is rotated")
    rope_linear_factor: float = knob(1.0, "all rotary frequencies are divided by it (linear scaling)")
    rope_llama3: tuple[float, ...] | None = knob(
        None, "Llama 3's scaling of the low rotary frequencies: factor, low, high, original positions"
    )
    norm: str = knob("rmsnorm", "rmsnorm | layernorm | layernorm_1p (scale stored minus one)")
    norm_eps: float = knob(1e-5, "added to the variance inside every norm")
    activation: str = knob("swiglu", "swiglu | gelu (exact) | gelu_tanh | squared_relu")
    bias: bool = knob(False, "biases on every linear map (norms keep theirs either way)")
    qkv_bias: bool = knob(False, "biases on query, key and value only (Qwen2)")
    qk_norm: bool = knob(False, "RMSNorm on each query and key head (Qwen3)")
    tied: bool = knob(True, "unembedding = embedding")
    init_std: float = knob(0.02, "standard deviation of the initial weights")
    scaled_init: bool = knob(True, "divide it by sqrt(2 layers) where a layer writes to the residual stream")
    dtype: str = knob("bfloat16", "dtype of activations and matmuls: bfloat16 | float32")
    param_dtype: str = knob("float32", "dtype of the master weights: float32 | bfloat16")
    remat: str = knob("layer", "what the backward pass recomputes: none | dots (all but matmuls) | layer")
    attention: str | None = knob(None, "xla | cudnn; None: cudnn where it can run, else xla")
    tokenizer_sha256: str | None = knob(None, "digest of the tokenizer file, compared with the data's manifest")

    @property
    def groups(self) -> int:
        """Key/value heads a layer (G)."""
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
    """Records of teacher logits. Paths may be files, globs, or templates whose file name holds CHUNK_ID."""

    train: tuple[str, ...] = knob((), "training records: comma-separated paths (.jsonl, .jsonl.gz, .jsonl.zst)")
    val: tuple[str, ...] = knob((), "validation records; empty: no validation")
    sequence_length: int = knob(0, "positions a row; shorter records are padded with loss mask 0")
    top_k: int | None = knob(None, "teacher entries used per position, largest first; None: all stored")
    shuffle: bool = knob(True, "a new seeded order every epoch; False: file order, cyclic")
    seed: int = knob(1234, "seed of the order")
    pack: bool = knob(False, "put several short records in a row, kept apart by segment ids")
    over_long: str = knob("error", "records longer than sequence_length: error | drop | truncate")
    n_chunks: int | None = knob(None, "files behind data.train's CHUNK_ID template; None: those found")
    n_examples_per_chunk: int | None = knob(None, "records each chunk of data.train must hold; None: whatever it holds")
    kind: str = knob("logits", "what topk_logits holds: logits (any shift) | log_probs | probs")
    teacher_temperature: float = knob(1.0, "temperature the stored logits were already divided by")
    strict: bool = knob(False, "refuse unsorted rows and duplicate ids instead of mending them")
    weighted_mask: bool = knob(False, "allow loss_mask values between 0 and 1")
    dedupe: bool = knob(False, "of records with the same index keep the last (an appended re-run)")
    allow_truncated: bool = knob(False, "drop a last record that was cut off instead of refusing the file")
    max_bad_records: int = knob(0, "records that may be left out as damaged before the run stops")
    verify_records: int = knob(256, "records of each set checked in full at start, spread evenly; -1: all")
    scratch_dir: str | None = knob(
        None, "where indices and unpacked files are kept; None: the system's", resumable=True
    )
    read_threads: int = knob(2, "threads that read and parse records", resumable=True)
    prefetch: int = knob(4, "batches prepared ahead of the step", resumable=True)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Sizes in sequences (rows)."""

    global_size: int = knob(128, "rows a step, over all devices")
    microbatch_size: int = knob(1, "rows a device computes at once", resumable=True)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective: kd_loss_weight * kd + sft_loss_weight * sft (see kdjax/losses/reference.py)."""

    kd_loss: str = knob("fwd_kl", "fwd_kl | bwd_kl | jsd")
    kd_loss_weight: float = knob(1.0, "weight of the distillation term")
    sft_loss_weight: float = knob(0.0, "weight of the cross-entropy with the labels")
    logits_scale: float = knob(1.0, "multiplies the student's logits in both terms (1 / temperature)")
    target_logits_scale: float = knob(1.0, "multiplies the teacher's logits (1 / temperature)")
    cross_tokenizer: str | bool | None = knob(None, "rank_match: compare sorted top-k values, ignore the teacher's ids")
    tail: str = knob("renormalize", "mass outside the top-k: renormalize (drop) | ghost (one more bucket)")
    jsd_beta: float = knob(0.5, "weight of the teacher in jsd's mixture, between 0 and 1")
    reduction: str = knob("token", "token: mean over the global batch's tokens | nemo: mean of microbatch means")
    implementation: str | None = knob(
        None,
        "reference | xla | pallas | triton | gathered (training only, no SFT term); None: the fastest that can run",
    )
    include_vocab_padding: bool = knob(False, "let the padded vocabulary rows into the softmax, as Megatron does")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Updates. Defaults are NeMo-Aligner's."""

    name: str = knob("adamw", "adamw | lion | sgd")
    lr: float = knob(3e-5, "peak learning rate")
    min_lr: float = knob(9e-7, "last learning rate of cosine and wsd")
    schedule: str = knob("cosine", "cosine (NeMo's CosineAnnealing) | constant | wsd (warm up, hold, decay)")
    warmup_steps: int = knob(10, "steps of linear warm-up")
    constant_steps: int = knob(0, "cosine: steps held at min_lr at the end; wsd: steps held at lr before the decay")
    b1: float = knob(0.9, "decay of the first moment (momentum for sgd)")
    b2: float = knob(0.98, "decay of the second moment")
    eps: float = knob(1e-8, "added to the root of the second moment")
    weight_decay: float = knob(0.01, "decoupled weight decay")
    decay_rule: str = knob("megatron", "not decayed: megatron: biases and norms | nemo: biases only")
    clip_norm: float | None = knob(1.0, "global norm the gradient is clipped to; None: not clipped")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = knob(0, "updates to make")
    val_every: int = knob(100, "steps between validations; the last step always validates")
    val_batches: int | None = knob(None, "global batches a validation reads; None: the whole set")
    save_every: int = knob(100, "steps between checkpoints; the last step always saves")
    log_every: int = knob(1, "steps between lines of metrics.jsonl", resumable=True)
    seed: int = knob(0, "seed of the initial weights")
    early_stop_patience: int | None = knob(None, "validations without improvement before stopping; None: never")
    max_skipped_steps: int = knob(8, "non-finite steps in a row, each left out, before the run stops")
    wandb_project: str | None = knob(None, "also log to this Weights & Biases project", resumable=True)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh. One size may be -1: all devices left."""

    pipe: int = knob(1, "pipeline stages: devices that each hold some of the layers", resumable=True)
    data: int = knob(
        -1, "replicas, each with its share of the batch; optimiser state is split over them", resumable=True
    )
    fsdp: int = knob(1, "the same, with the parameters split over them too (ZeRO-3)", resumable=True)
    tensor: int = knob(1, "devices over which each layer is split; keep them in one host", resumable=True)
    interleave: int = knob(1, "runs of layers a stage, for smaller bubbles and more sends (v)", resumable=True)
    schedule: str = knob("1f1b", "1f1b | gpipe, which keeps an input of every microbatch", resumable=True)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept in RUN/checkpoints."""

    keep_last: int = knob(2, "newest checkpoints kept", resumable=True)
    keep_best: int = knob(1, "best checkpoints kept besides, by best_metric; 0: none", resumable=True)
    best_metric: str = knob("loss", "validation metric to keep and stop by: loss | kd_loss | sft_loss", resumable=True)


@dataclasses.dataclass(frozen=True)
class ResumeConfig:
    """Taking up a run directory again."""

    allow_data_change: bool = knob(False, "go on although data or batch.global_size changed", resumable=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run needs, group by group."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()

    def __getitem__(self, dotted: str) -> Any:
        group, key = dotted.split(".")
        return getattr(getattr(self, group), key)


GROUPS: dict[str, type] = typing.get_type_hints(Config)
KNOBS: dict[str, "dataclasses.Field[Any]"] = {
    f"{group}.{field.name}": field for group, cls in GROUPS.items() for field in dataclasses.fields(cls)
}
TYPES: dict[str, Any] = {
    f"{group}.{name}": kind for group, cls in GROUPS.items() for name, kind in typing.get_type_hints(cls).items()
}


def build(settings: Mapping[str, Any] | ConfigDict, overrides: Mapping[str, str] | None = None) -> Config:
    """The configuration from a (nested) mapping or `ConfigDict`, then overrides as typed on the command line.

    Raises UserError for an unknown key (with the nearest known one) and for a value of the wrong type.
    """
    settings = settings.to_dict() if isinstance(settings, ConfigDict) else settings
    values: dict[str, Any] = {}
    for group in settings:
        _known(group, GROUPS, "group")
        if not isinstance(settings[group], Mapping):
            raise UserError(
                f"config group {group!r} holds {settings[group]!r}; it must hold keys, as in {group}.key = value"
            )
        for key, value in settings[group].items():
            dotted = _known(f"{group}.{key}", KNOBS, "key")
            if value is not None or type(None) in _options(TYPES[dotted]):  # else an empty placeholder
                values[dotted] = _typed(dotted, value)
    for dotted, text in (overrides or {}).items():
        _known(dotted, KNOBS, "key")
        values[dotted] = _typed(dotted, _parse(text, TYPES[dotted]))
    return Config(
        **{
            group: cls(**{k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{group}.")})
            for group, cls in GROUPS.items()
        }
    )


def replace(config: Config, **changes: Any) -> Config:
    """A copy with dotted keys replaced, written with a double underscore: `replace(c, optim__lr=1e-3)`."""
    for name, value in changes.items():
        group, key = name.split("__")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{key: value})})
    return config


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value, in the order of the dataclasses."""
    return {dotted: config[dotted] for dotted in KNOBS}


def to_json(config: Config) -> str:
    """The configuration as indented JSON, the contents of RUN/config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The configuration written by `to_json`."""
    return build(json.loads(text))


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) for every knob that differs."""
    return [(k, v, new[k]) for k, v in flatten(old).items() if v != new[k]]


def is_resumable(dotted: str) -> bool:
    """Whether a run directory may be taken up again with another value of this knob."""
    return bool(KNOBS[dotted].metadata["resumable"])


def describe() -> Iterator[str]:
    """One line a knob: name, default, meaning."""
    for dotted, field in KNOBS.items():
        yield f"  --config.{dotted}={field.default!r}\n        {field.metadata['meaning']}"


def _known(name: str, known: Mapping[str, Any], what: str) -> str:
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    same_key = [k for k in known if k.partition(".")[2] == name.rpartition(".")[2]]
    group = [k.partition(".")[2] for k in known if k.startswith(name.partition(".")[0] + ".")]
    listed = f"{name.partition('.')[0]} has {', '.join(group)}" if group else f"there are {', '.join(GROUPS)}"
    hint = f"did you mean {(same_key or near)[0]!r}? " if same_key or near else ""
    raise UserError(f"unknown config {what} {name!r}: {hint}{listed}")


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _typed(dotted: str, value: Any) -> Any:
    """The value as the first of the knob's types that takes it."""
    for kind in _options(TYPES[dotted]):
        try:
            return _cast(value, kind)
        except TypeError:
            continue
    wanted = " or ".join(str(k) if typing.get_args(k) else k.__name__ for k in _options(TYPES[dotted]))
    raise UserError(
        f"{dotted} = {value!r} is a {type(value).__name__}; it must be {wanted}".replace("NoneType", "None")
    )


def _cast(value: Any, kind: Any) -> Any:
    """Ints widen to float, integral floats narrow to int, one item becomes a tuple. Raises TypeError for the rest."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in (bool, str, type(None)) and isinstance(value, kind):
        return value
    if (kind is float and number) or (kind is int and number and value == int(value)):
        return kind(value)
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(_cast(item, typing.get_args(kind)[0]) for item in items)
    raise TypeError(f"{value!r} is no {kind}")


def _parse(text: str, kind: Any) -> Any:
    """A command-line word as the first of the knob's types that it can be; itself when it can be none."""
    options = sorted(_options(kind), key=lambda option: option is not type(None))
    for option in options:
        try:
            if option is type(None) and text.lower() == "none":
                return None
            if option is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if option is int or option is float:
                return float(text)
        except ValueError:
            continue
        if typing.get_origin(option) is tuple:
            words = [word.strip() for word in text.split(",") if word.strip()]
            return tuple(words) if typing.get_args(option)[0] is str else _numbers(words)
    return text


def _numbers(words: list[str]) -> tuple[Any, ...]:
    """Words as numbers, ranges such as 0-11 written out (both ends count); words that are neither stay as they are."""
    found: list[Any] = []
    for word in words:
        first, dash, last = word.partition("-")
        if first.isdecimal() and dash and last.isdecimal():
            found.extend(range(int(first), int(last) + 1))
            continue
        try:
            found.append(float(word))
        except ValueError:
            found.append(word)
    return tuple(found)
