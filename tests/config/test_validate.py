"""Every configuration that cannot work is refused with its key, its value and what would."""

import dataclasses
import importlib.util

import pytest

from kdjax import config as configs
from kdjax.config import Config
from kdjax.config.validate import (
    CHOICES,
    NOT_NEGATIVE,
    POSITIVE,
    SHARES,
    keys,
    resolve,
    resolve_model,
    validate,
    validate_model,
)
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


@pytest.mark.parametrize("key", CHOICES)
def test_unknown_choices_list_the_known(key: str) -> None:
    with pytest.raises(UserError, match=rf"{key} = 'typo': choose one of .*{next(iter(CHOICES[key]))}"):
        validate(configs.replace(GOOD, **{key.replace(".", "__"): "typo"}))


@pytest.mark.parametrize("key", keys(POSITIVE))
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_positive_numbers(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{key} = (0|-1|nan): "):
        validate(configs.replace(GOOD, **{key.replace(".", "__"): value}))


@pytest.mark.parametrize("key", keys(NOT_NEGATIVE))
def test_numbers_that_may_be_zero_but_not_less(key: str) -> None:
    with pytest.raises(UserError, match=rf"{key} = -1: it must not be negative"):
        validate(configs.replace(GOOD, **{key.replace(".", "__"): -1}))


@pytest.mark.parametrize("key", keys(SHARES))
def test_shares(key: str) -> None:
    with pytest.raises(UserError, match=rf"{key} = 1.5: it must lie between 0 and 1"):
        validate(configs.replace(GOOD, **{key.replace(".", "__"): 1.5}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__n_groups": 3},
            r"model.n_groups = 3: it must divide model.n_heads = 4; the nearest that does is 2",
        ),
        ({"model__d_model": 33}, r"model.d_model = 33: it is no multiple of model.n_heads = 4"),
        ({"model__rope_fraction": 0.4}, r"model.rope_fraction = 0.4: it rotates an odd number"),
        (
            {"model__rope_llama3": (8.0, 4.0, 4.0, 64.0)},
            r"rope_llama3 = \(8.0, 4.0, 4.0, 64.0\): .*low, high \(above low",
        ),
        ({"model__rope_llama3": (8.0, 1.0, 4.0)}, r"rope_llama3 = .*give factor, low, high"),
        ({"model__keep_layers": (0, 1)}, r"keep_layers = \(0, 1\): it picks layers of model.init_from; set that too"),
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
            r"early_stop_patience = 2: stopping early needs data.val",
        ),
        ({"train__save_every": 150}, r"train.save_every = 150: .* such as 100"),
        (
            {"loss__kd_loss_weight": 0.0},
            r"loss.kd_loss_weight = 0.0: loss.sft_loss_weight is 0 too, so there is nothing to learn",
        ),
        (
            {"loss__implementation": "gathered", "loss__sft_loss_weight": 0.4},
            r"'gathered': it reads the teacher's K ids only",
        ),
        ({"loss__jsd_beta": 1.0}, r"loss.jsd_beta = 1.0: it must lie strictly between 0 and 1"),
        (
            {"loss__tail": "ghost", "loss__target_logits_scale": 0.5},
            r"target_logits_scale = 0.5: .*logsumexp.*set it to 1",
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
        ({"mesh__tensor": 3}, r"mesh.tensor = 3: it must divide model.n_heads = 4; 2 does, or 6 of those"),
        (
            {"mesh__tensor": 2, "model__vocab_size": 61, "model__padded_vocab_size": None},
            r"model.padded_vocab_size = 61: .* mesh.tensor 2 x mesh.pipe 1 = 2 devices, which must divide it; 62 does",
        ),
        (
            {"mesh__tensor": 2, "mesh__pipe": 2, "model__padded_vocab_size": 102},
            r"model.padded_vocab_size = 102: .* mesh.tensor 2 x mesh.pipe 2 = 4 .*; 104 does, or 3 devices",
        ),
        (
            {"mesh__pipe": 4, "model__layers": 6},
            r"mesh.pipe = 4: model.layers = 6 cannot be cut into 4 equal runs .*; mesh.pipe 3 can, or 4 or 8 layers",
        ),
        (
            {"mesh__pipe": 2, "mesh__interleave": 3, "model__layers": 4},
            r"cut into 6 equal runs \(mesh.pipe 2 x mesh.interleave 3\); mesh.pipe 2 can, or 6 layers",
        ),
        ({"mesh__interleave": 2}, r"mesh.interleave = 2: there are no stages to interleave; set mesh.pipe"),
        ({"mesh__schedule": "zb"}, r"mesh.schedule = 'zb': choose one of 1f1b, gpipe"),
        ({"mesh__pipe": -1, "mesh__data": -1}, r"mesh.data = -1: mesh.pipe is -1 too; only one"),
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
        ({"rope_fraction": 1.5}, r"model.rope_fraction = 1.5: it must lie between 0 and 1"),
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
