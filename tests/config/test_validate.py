"""Every configuration that cannot work is refused with its key, its value and what would."""

import dataclasses
import importlib.util

import pytest

from kdjax import config as configs
from kdjax.config import KNOBS, Config
from kdjax.config.validate import resolve, resolve_model, validate, validate_model
from kdjax.types import UserError

GOOD = resolve(
    configs.build(
        {
            "model": {"layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 64, "vocab_size": 100},
            "data": {"train": "train.jsonl", "val": "val.jsonl", "sequence_length": 16},
            "batch": {"global_size": 8, "microbatch_size": 4},
            "train": {"steps": 50},
        }
    )
)


def changed(**changes: object) -> Config:
    return resolve(configs.replace(GOOD, **changes))


def test_a_good_one_passes() -> None:
    validate(GOOD)


def test_what_follows_is_filled_in() -> None:
    assert (GOOD.model.n_groups, GOOD.model.head_dim, GOOD.model.padded_vocab_size) == (4, 8, 100)
    assert GOOD.model.max_positions is None
    assert changed(model__position="learned").model.max_positions == 16
    assert changed(loss__cross_tokenizer=True).loss.cross_tokenizer == "rank_match"
    assert changed(loss__cross_tokenizer=False).loss.cross_tokenizer is None


def with_value(key: str, value: object) -> Config:
    return configs.replace(GOOD, **{key.replace(".", "__"): value})


@pytest.mark.parametrize("key", [key for key, knob in KNOBS.items() if knob.choices])
def test_unknown_choices_list_the_known(key: str) -> None:
    choices = KNOBS[key].choices
    assert choices is not None
    with pytest.raises(UserError, match=rf"{key} = 'typo': choose one of {', '.join(choices)}"):
        validate(with_value(key, "typo"))


def dotted(**groups: str) -> list[str]:
    return [f"{group}.{name}" for group, names in groups.items() for name in names.split()]


ABOVE_0 = dotted(
    model="layers d_model n_heads n_groups head_dim d_ff vocab_size padded_vocab_size max_positions rope_theta "
    "rope_linear_factor norm_eps init_std",
    data="sequence_length top_k n_chunks n_examples_per_chunk read_threads prefetch teacher_temperature",
    batch="global_size microbatch_size",
    optim="lr eps clip_norm",
    train="steps val_every val_batches save_every log_every early_stop_patience max_skipped_steps",
    mesh="interleave",
    checkpoint="keep_last",
)
AT_LEAST_0 = dotted(
    model="rope_fraction",
    data="seed max_bad_records",
    optim="min_lr warmup_steps constant_steps weight_decay b1 b2",
    train="seed",
    checkpoint="keep_best",
)
BELOW_1 = ["optim.b1", "optim.b2"]  # 1 would forget nothing and divide by 0


def test_the_bounds_are_these() -> None:
    """A knob whose bound is dropped or changed must not go unnoticed."""
    bounded = {key: (knob.above, knob.low, knob.high, knob.below) for key, knob in KNOBS.items()}
    expected = dict.fromkeys(ABOVE_0, (0, None, None, None)) | dict.fromkeys(AT_LEAST_0, (None, 0, None, None))
    expected |= dict.fromkeys(BELOW_1, (None, 0, None, 1)) | {"data.verify_records": (None, -1, None, None)}
    expected |= {"model.rope_fraction": (None, 0, 1, None)}
    assert {key: bounds for key, bounds in bounded.items() if any(b is not None for b in bounds)} == expected


@pytest.mark.parametrize("key", ABOVE_0)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_positive_numbers(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{key} = (0|-1|nan): "):
        validate(with_value(key, value))


@pytest.mark.parametrize("key", AT_LEAST_0)
def test_numbers_that_may_be_zero_but_not_less(key: str) -> None:
    with pytest.raises(UserError, match=rf"{key} = -1: it must be at least 0"):
        validate(with_value(key, -1))


def test_shares() -> None:
    with pytest.raises(UserError, match=r"model.rope_fraction = 1.5: it must be at most 1"):
        validate(with_value("model.rope_fraction", 1.5))
    for key in BELOW_1:
        with pytest.raises(UserError, match=rf"{key} = 1.0: it must be below 1"):
            validate(with_value(key, 1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__n_groups": 3},
            r"model.n_groups = 3: it must divide model.n_heads = 4; 2 does",
        ),
        ({"model__d_model": 33}, r"model.d_model = 33: it is not a multiple of model.n_heads = 4"),
        ({"model__rope_fraction": 0.4}, r"model.rope_fraction = 0.4: it rotates an odd number"),
        (
            {"model__rope_llama3": (8.0, 4.0, 4.0, 64.0)},
            r"rope_llama3 = \(8.0, 4.0, 4.0, 64.0\): .*low, high \(above low",
        ),
        ({"model__rope_llama3": (8.0, 1.0, 4.0)}, r"rope_llama3 = .*give factor, low, high"),
        (
            {"model__keep_layers": (0, 1)},
            r"keep_layers = \(0, 1\): it selects layers of model.init_from, which is not set",
        ),
        (
            {"model__padded_vocab_size": 99},
            r"padded_vocab_size = 99: it must be at least model.vocab_size = 100",
        ),
        (
            {"model__position": "learned", "model__max_positions": 8},
            r"data.sequence_length = 16: the model has 8 learned positions",
        ),
        ({"data__train": ()}, r"data.train = \(\): name the files"),
        ({"data__top_k": 101}, r"data.top_k = 101: it exceeds model.vocab_size = 100"),
        ({"data__verify_records": -2}, r"data.verify_records = -2"),
        (
            {"batch__microbatch_size": 3},
            r"batch.microbatch_size = 3: it must divide batch.global_size = 8; 2 does",
        ),
        (
            {"data__val": (), "train__early_stop_patience": 2},
            r"early_stop_patience = 2: stopping early needs validation records; set data.val",
        ),
        ({"train__save_every": 150}, r"train.save_every = 150: .* such as 100"),
        (
            {"loss__kd_loss_weight": 0.0},
            r"loss.kd_loss_weight = 0.0 and loss.sft_loss_weight = 0 leave no loss",
        ),
        (
            {"loss__implementation": "gathered", "loss__sft_loss_weight": 0.4},
            r"'gathered' computes the K taught logits only, but loss.sft_loss_weight = 0.4 needs all",
        ),
        ({"loss__jsd_beta": 1.0}, r"loss.jsd_beta = 1.0 .*strictly between 0 and 1"),
        (
            {"loss__targets": "sampled", "loss__target_logits_scale": 0.5},
            r"loss.target_logits_scale = 0.5 .*loss.targets = 'sampled'.*drawn.*set loss.target_logits_scale = 1",
        ),
        ({"loss__tail": "label", "loss__kd_loss": "jsd"}, r"loss.kd_loss = 'jsd' .*loss.tail = 'label'.*'fwd_kl'"),
        (
            {"loss__targets": "sampled", "loss__tail": "ghost"},
            r"loss.tail = 'ghost' .*loss.targets = 'sampled'.*loss.tail = 'renormalize'",
        ),
        (
            {"loss__targets": "sampled", "loss__implementation": "gathered", "loss__sft_loss_weight": 0.0},
            r"'gathered' computes the K taught logits only, but loss.targets = 'sampled' needs all",
        ),
        (
            {"data__teacher_temperature": 2.0, "loss__target_logits_scale": 0.5},
            r"target_logits_scale = 0.5: data.teacher_temperature = 2.0 .*applied twice",
        ),
        ({"optim__lr": 1e-7}, r"optim.min_lr = 9e-07: it exceeds optim.lr = 1e-07"),
        (
            {"optim__schedule": "constant", "optim__constant_steps": 5},
            r"optim.constant_steps = 5: .*does not use it",
        ),
        ({"optim__constant_steps": 1000}, r"optim.constant_steps = 1000: .*at most 49"),
        ({"optim__warmup_steps": 50}, r"optim.warmup_steps = 50: .*at most 49"),
        (
            {"mesh__tensor": 3},
            r"mesh.tensor = 3: it must divide model.n_heads = 4; mesh.tensor = 2 does, or model.n_heads = 6",
        ),
        (
            {"mesh__tensor": 2, "model__vocab_size": 61, "model__padded_vocab_size": None},
            r"model.padded_vocab_size = 61: .* mesh.tensor 2 x mesh.pipe 1 = 2 devices, which must divide it; 62 works",
        ),
        (
            {"mesh__tensor": 2, "mesh__pipe": 2, "model__padded_vocab_size": 102},
            r"model.padded_vocab_size = 102: .* mesh.tensor 2 x mesh.pipe 2 = 4 .*; 104 works, or 3 devices",
        ),
        (
            {"mesh__pipe": 4, "model__layers": 6},
            r"mesh.pipe = 4: model.layers = 6 cannot be cut into 4 equal runs .*; use mesh.pipe = 3, or 4 or 8 layers",
        ),
        (
            {"mesh__pipe": 2, "mesh__interleave": 3, "model__layers": 4},
            r"cut into 6 equal runs \(mesh.pipe 2 x mesh.interleave 3\); use mesh.pipe = 2, or 6 layers",
        ),
        ({"mesh__interleave": 2}, r"mesh.interleave = 2: there are no stages to interleave; set mesh.pipe"),
        ({"mesh__schedule": "zb"}, r"mesh.schedule = 'zb': choose one of 1f1b, gpipe"),
        ({"mesh__pipe": -1, "mesh__data": -1}, r"mesh.data = -1: mesh.pipe is -1 too; only one size can be -1"),
        *(
            ({f"mesh__{name}": 0}, rf"mesh.{name} = 0: give a number of devices, or -1 for all")
            for name in ("pipe", "data", "fsdp", "tensor")
        ),
    ],
)
def test_what_cannot_work(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(changed(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "typo"}, r"model.norm = 'typo': choose one of rmsnorm"),
        ({"layers": 0}, r"model.layers = 0: "),
        ({"rope_fraction": 1.5}, r"model.rope_fraction = 1.5: it must be at most 1"),
        ({"n_groups": 3}, r"model.n_groups = 3: it must divide model.n_heads = 4"),
        ({"position": "learned", "max_positions": None}, r"model.max_positions = None: learned positions need"),
    ],
)
def test_an_architecture_alone(changes: dict, message: str) -> None:
    """Without the rest of a configuration, whose defaults would not do."""
    validate_model(GOOD.model)
    with pytest.raises(UserError):
        validate(Config(model=GOOD.model))
    with pytest.raises(UserError, match=message):
        validate_model(resolve_model(dataclasses.replace(GOOD.model, **changes)))


def test_weights_and_biases_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'kdjax\[wandb\]'"):
        validate(changed(train__wandb_project="distil"))
