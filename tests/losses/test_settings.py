"""Settings and arguments: each one changes something, and a wrong one is named with the way out."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from loss_oracle import jit, make_inputs

from kdjax.config import LossConfig
from kdjax.losses import dispatch, linear_topk_kd_loss, topk_kd_loss
from kdjax.losses.objective import Objective
from kdjax.losses.rows import pallas, xla
from kdjax.losses.vocabulary import Vocabulary
from kdjax.types import UserError

INPUTS = make_inputs(31, (2, 3, 19, 4))
HIDDEN, UNEMBED = jnp.ones((2, 3, 5)), jnp.ones((19, 5))


def call(**changes: Any) -> Any:
    arguments = {
        "student_logits": INPUTS.logits,
        "topk_logits": INPUTS.topk_logits,
        "topk_token_ids": INPUTS.topk_token_ids,
        "labels": INPUTS.labels,
        "log_sum_exp_logits": INPUTS.log_sum_exp_logits,
    }
    return topk_kd_loss(**{**arguments, **changes})


SAMPLED: dict[str, Any] = {"targets": "sampled", "topk_weights": INPUTS.topk_weights}


def call_linear(**changes: Any) -> Any:
    arguments = {
        "hidden": HIDDEN,
        "unembed": UNEMBED,
        "topk_logits": INPUTS.topk_logits,
        "topk_token_ids": INPUTS.topk_token_ids,
        "labels": INPUTS.labels,
        "loss_mask": INPUTS.weight,
        "log_sum_exp_logits": INPUTS.log_sum_exp_logits,
    }
    return linear_topk_kd_loss(**{**arguments, **changes})


BAD_SETTINGS = [
    ({"kd_loss": "fwdkl"}, "kd_loss = 'fwdkl'.*'fwd_kl', 'bwd_kl', 'jsd'"),
    ({"kd_loss": None}, "kd_loss = None.*'fwd_kl', 'bwd_kl', 'jsd'"),
    ({"tail": "drop"}, "tail = 'drop'.*'renormalize', 'ghost', 'label'"),
    ({"targets": "draws"}, "targets = 'draws' is unknown.*'topk', 'sampled'"),
    ({"cross_tokenizer": "rank"}, "cross_tokenizer = 'rank' is unknown.*None, 'rank_match'"),
    ({"cross_tokenizer": 1}, "cross_tokenizer = 1 .*'rank_match'"),
    ({"kd_loss_weight": -1.0}, "kd_loss_weight = -1.0 would maximise its term.*0 to leave"),
    ({"sft_loss_weight": -0.1}, "sft_loss_weight = -0.1 would maximise its term.*0 to leave"),
    ({"kd_loss_weight": 0.0}, "kd_loss_weight = 0.0 and sft_loss_weight = 0 leave no loss.*positive"),
    ({"kd_loss_weight": float("nan")}, "kd_loss_weight = nan.*finite Python number"),
    ({"kd_loss_weight": float("inf")}, "kd_loss_weight = inf.*finite Python number"),
    ({"sft_loss_weight": True}, "sft_loss_weight = True is a bool.*Python number"),
    ({"target_logits_scale": None}, "target_logits_scale = None is a NoneType.*Python number"),
    ({"sft_loss_weight": "0.4"}, "sft_loss_weight = '0.4' is a str.*Python number"),
    ({"sft_loss_weight": jnp.ones(())}, "sft_loss_weight = Array.*Python number"),
    ({"logits_scale": 0.0}, "logits_scale = 0.0.*above 0"),
    ({"target_logits_scale": -2}, "target_logits_scale = -2.*above 0"),
    ({"target_logits_scale": 0.0}, "target_logits_scale = 0.0.*above 0"),
    ({"jsd_beta": 1.0}, "jsd_beta = 1.0.*strictly between 0 and 1"),
    ({"jsd_beta": 0.0}, "jsd_beta = 0.0.*strictly between 0 and 1"),
    (
        {"tail": "ghost", "target_logits_scale": 0.5},
        "target_logits_scale = 0.5 does not work with tail = 'ghost'.*'renormalize'",
    ),
    (
        {"tail": "label", "target_logits_scale": 0.5},
        "target_logits_scale = 0.5 does not work with tail = 'label'.*'renormalize'",
    ),
    (
        {**SAMPLED, "target_logits_scale": 0.5},
        "target_logits_scale = 0.5 does not work with targets = 'sampled': the ids were drawn.*= 1 or targets = 'topk'",
    ),
    (
        {"tail": "label", "kd_loss": "jsd"},
        "kd_loss = 'jsd' does not work with tail = 'label'.*kd_loss = 'fwd_kl' or tail = 'renormalize'",
    ),
    (
        {**SAMPLED, "kd_loss": "bwd_kl"},
        "kd_loss = 'bwd_kl' does not work with targets = 'sampled'.*kd_loss = 'fwd_kl' or targets = 'topk'",
    ),
    (
        {"tail": "label", "cross_tokenizer": True},
        "cross_tokenizer = 'rank_match' does not work with tail = 'label'.*= None or tail = 'renormalize'",
    ),
    (
        {**SAMPLED, "cross_tokenizer": True},
        "cross_tokenizer = 'rank_match' does not work with targets = 'sampled'.*= None or targets = 'topk'",
    ),
    ({**SAMPLED, "tail": "ghost"}, "tail = 'ghost' does not work with targets = 'sampled'.*'renormalize'.*'topk'"),
    ({**SAMPLED, "tail": "label"}, "tail = 'label' does not work with targets = 'sampled'.*'renormalize'.*'topk'"),
    ({"targets": "sampled"}, r"targets = 'sampled' needs topk_weights \[B, T, K\].*None.*targets = 'topk'"),
    ({"topk_weights": INPUTS.topk_weights}, "topk_weights are given, which targets = 'topk' does not read.*'sampled'"),
    ({**SAMPLED, "topk_weights": INPUTS.topk_weights[..., :3]}, r"topk_weights has shape \[2, 3, 3\].*\[2, 3, 4\]"),
    ({**SAMPLED, "topk_weights": INPUTS.topk_token_ids}, "topk_weights is int32.*floating-point"),
    ({"tail": "ghost", "log_sum_exp_logits": None}, "tail = 'ghost' needs log_sum_exp_logits.*'renormalize'"),
    ({"tail": "label", "log_sum_exp_logits": None}, "tail = 'label' needs log_sum_exp_logits.*'renormalize'"),
    ({**SAMPLED, "log_sum_exp_logits": None}, "targets = 'sampled' needs log_sum_exp_logits.*targets = 'topk'"),
    ({"implementation": "pallas"}, "implementation = 'pallas' is a kernel for NVIDIA GPUs and this is cpu.*'xla'"),
    ({"implementation": "triton"}, "implementation = 'triton' is a kernel for NVIDIA GPUs and this is cpu.*'xla'"),
    ({"implementation": "fast"}, "implementation = 'fast' is not available.*'reference', 'xla'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
@pytest.mark.parametrize("function", [call, call_linear])
def test_bad_settings(function: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        function(**settings)


BAD_ARGUMENTS = [
    ({"student_logits": INPUTS.logits[0]}, r"student_logits is float32 \[3, 19\].*3 dimensions"),
    ({"student_logits": INPUTS.logits.astype(int)}, "student_logits is int32.*floating-point"),
    ({"topk_logits": INPUTS.topk_logits[:, :2]}, r"topk_logits has shape \[2, 2, 4\].*\[2, 3, 4\]"),
    ({"topk_token_ids": INPUTS.topk_token_ids[..., :3]}, r"topk_token_ids has shape \[2, 3, 3\].*\[2, 3, 4\]"),
    ({"topk_token_ids": INPUTS.topk_token_ids * 1.0}, "topk_token_ids is float32.*integer"),
    ({"topk_logits": INPUTS.topk_token_ids}, "topk_logits is int32.*floating-point"),
    ({"labels": INPUTS.labels[..., None]}, "labels is int32.*2 dimensions"),
    ({"labels": INPUTS.labels[:1]}, r"labels has shape \[1, 3\].*\[2, 3\]"),
    ({"log_sum_exp_logits": INPUTS.log_sum_exp_logits[:, 1:]}, r"log_sum_exp_logits has shape \[2, 2\]"),
    ({"log_sum_exp_logits": INPUTS.labels}, "log_sum_exp_logits is int32.*2 dimensions and a floating-point dtype"),
    ({"student_logits": INPUTS.logits[..., :3]}, "K = 4 .* V = 3.*between 1 and V"),
    (
        {"topk_logits": np.zeros((2, 3, 0)), "topk_token_ids": np.zeros((2, 3, 0), int)},
        "K = 0 .*between 1 and V",
    ),
    ({"axis_name": "tensor"}, "axis_name = 'tensor' is not a mesh axis here.*jax.shard_map.*None"),
    ({"vocab_size": 0}, "vocab_size = 0 is not between 1 and the number of columns, 19"),
    ({"vocab_size": 19.0}, "vocab_size = 19.0 is not between 1 and the number of columns, 19"),
    ({"vocab_size": 20}, "vocab_size = 20 is not between 1 and the number of columns, 19.*None"),
    ({"vocab_size": 3}, "K = 4 .* V = 3.*between 1 and V"),
    ({"implementation": "gathered"}, "implementation = 'gathered' is not available.*'xla'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(**arguments)


BAD_LINEAR_ARGUMENTS = [
    ({"hidden": HIDDEN[0]}, "hidden is float32.*3 dimensions"),
    ({"hidden": HIDDEN.astype(int)}, "hidden is int32.*floating-point"),
    ({"unembed": UNEMBED[None]}, r"unembed is float32 \[1, 19, 5\].*2 dimensions"),
    ({"unembed": UNEMBED.T}, r"unembed \(5, 19\) and hidden \(2, 3, 5\) differ in width.*transposed"),
    ({"loss_mask": INPUTS.weight[:1]}, r"loss_mask has shape \[1, 3\].*\[2, 3\]"),
    ({"chunk_tokens": 0}, "chunk_tokens = 0.*1 or more"),
    ({"axis_name": ("pipe", "tensor")}, r"axis_name = \('pipe', 'tensor'\) is not a mesh axis here"),
    (
        {"implementation": "gathered", "sft_loss_weight": 0.4},
        "'gathered'.*sft_loss_weight = 0.4 needs all.*= None",
    ),
    (
        {"implementation": "gathered", "tail": "ghost"},
        "'gathered'.*tail = 'ghost' needs all.*= None",
    ),
    ({"implementation": "gathered", "tail": "label"}, "'gathered'.*tail = 'label' needs all.*= None"),
    ({"implementation": "gathered", **SAMPLED}, "'gathered'.*targets = 'sampled' needs all.*= None"),
    (
        {"implementation": "gathered", "cross_tokenizer": True},
        "'gathered'.*'rank_match' needs all.*= None",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_LINEAR_ARGUMENTS)
def test_bad_linear_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call_linear(**arguments)


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"kd_loss": "bwd_kl"}),
        ({}, {"kd_loss": "jsd"}),
        ({"kd_loss": "jsd"}, {"jsd_beta": 0.25}),
        ({}, {"kd_loss_weight": 0.5}),
        ({}, {"sft_loss_weight": 0.5}),
        ({}, {"logits_scale": 0.5}),
        ({}, {"target_logits_scale": 0.5}),
        ({}, {"cross_tokenizer": "rank_match"}),
        ({}, {"tail": "ghost"}),
        ({"tail": "ghost"}, {"log_sum_exp_logits": INPUTS.log_sum_exp_logits + 1}),
        ({}, {"tail": "label"}),
        ({"tail": "ghost"}, {"tail": "label"}),
        ({"tail": "label"}, {"labels": (INPUTS.labels + 1) % 19}),
        ({"tail": "label"}, {"log_sum_exp_logits": INPUTS.log_sum_exp_logits + 1}),
        ({}, SAMPLED),
        (SAMPLED, {"topk_weights": INPUTS.topk_weights / 2}),
        (SAMPLED, {"log_sum_exp_logits": INPUTS.log_sum_exp_logits + 1}),
        (SAMPLED, {"logits_scale": 0.5}),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_each_setting_changes_the_loss(implementation: str, base: dict[str, Any], change: dict[str, Any]) -> None:
    before, after = (
        jit(lambda z, settings=settings: call(student_logits=z, implementation=implementation, **settings)[0])
        for settings in (base, {**base, **change})
    )
    difference = np.abs(after(INPUTS.logits) - before(INPUTS.logits))
    np.testing.assert_array_less(1e-3, difference.max())


def test_aliases() -> None:
    np.testing.assert_array_equal(call(cross_tokenizer=True)[0], call(cross_tokenizer="rank_match")[0])
    np.testing.assert_array_equal(call(cross_tokenizer=False)[0], call()[0])


def test_sft_is_not_computed_unless_asked_for() -> None:
    _, kd, sft = call()
    np.testing.assert_array_equal(sft, 0)
    assert np.abs(kd).min() > 0
    np.testing.assert_array_less(0, call(sft_loss_weight=1.0)[2])


def test_distillation_alone_makes_no_pass_over_the_vocabulary() -> None:
    """Neither an exponential nor a maximum of all logits, forward or back."""

    def program(**settings: Any) -> str:
        def loss(z: jax.Array) -> jax.Array:
            return call(student_logits=z, implementation="xla", **settings)[0].sum()

        return str(jax.make_jaxpr(jax.grad(loss))(INPUTS.logits))

    whole = "f32[2,3,19] = exp"
    assert whole not in program()
    assert whole in program(sft_loss_weight=0.1)
    for choice in ({"tail": "ghost"}, {"tail": "label"}, SAMPLED):
        assert whole in program(**choice)


def test_none_logs_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="kdjax"):
        call()
        call()
        call(implementation="reference")
        call_linear()
    assert caplog.messages == [
        "topk_kd_loss: implementation 'xla' chosen",
        "linear_topk_kd_loss: implementation 'xla' chosen",
    ]


@pytest.mark.parametrize(
    ("platform", "settings", "logits", "linear"),
    [
        ("cpu", {}, "xla", "gathered"),
        ("cpu", {"sft_loss_weight": 0.4}, "xla", "xla"),
        ("cpu", {"tail": "ghost"}, "xla", "xla"),
        ("cpu", {"cross_tokenizer": "rank_match"}, "xla", "xla"),
        ("cuda", {}, "xla", "gathered"),
        ("cuda", {"sft_loss_weight": 0.4}, "pallas", "pallas"),
        ("cuda", {"tail": "ghost"}, "pallas", "pallas"),
        ("cpu", {"tail": "label"}, "xla", "xla"),
        ("cpu", {"targets": "sampled"}, "xla", "xla"),
        ("cuda", {"tail": "label"}, "pallas", "pallas"),
        ("cuda", {"targets": "sampled"}, "pallas", "pallas"),
        ("rocm", {"sft_loss_weight": 0.4}, "xla", "xla"),
        ("tpu", {"sft_loss_weight": 0.4}, "xla", "xla"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, platform: str, settings: dict[str, Any], logits: str, linear: str
) -> None:
    """By platform, settings and K / V."""
    monkeypatch.setattr(dispatch, "platform", lambda: platform)
    monkeypatch.setattr(dispatch, "on_one_device", lambda: True)
    objective, float32 = Objective(**settings), jnp.dtype("float32")
    assert dispatch.choose_logits(None, objective, float32) == logits
    assert dispatch.choose_linear(None, objective, 64, 49152, float32) == linear
    limit = 64 * (16 if platform == "cpu" else 700)  # measured on a CPU, computed for an H100
    assert dispatch.choose_linear(None, objective, 64, limit, float32) == linear
    assert dispatch.choose_linear(None, objective, 64, limit - 1, float32) != "gathered"
    assert dispatch.choose_logits(None, objective, jnp.dtype("float64")) == "xla"
    assert dispatch.choose_linear(None, objective, 64, 128, jnp.dtype("float64")) == "xla"
    monkeypatch.setattr(dispatch, "on_one_device", lambda: False)
    assert dispatch.choose_logits(None, objective, float32) == "xla"


@pytest.mark.parametrize("implementation", ["pallas", "triton", "pallas_interpret"])
@pytest.mark.parametrize("choose", ["logits", "linear"])
def test_kernels_compute_in_float32(monkeypatch: pytest.MonkeyPatch, implementation: str, choose: str) -> None:
    monkeypatch.setattr(dispatch, "platform", lambda: "cuda")
    arguments = (64, 49152) if choose == "linear" else ()
    choice = functools.partial(getattr(dispatch, f"choose_{choose}"), implementation, Objective(), *arguments)
    assert choice(jnp.dtype("float32")) == implementation
    with pytest.raises(UserError, match=f"'{implementation}' computes in float32; for float64 choose 'xla'"):
        choice(jnp.dtype("float64"))


def test_other_implementations_take_any_dtype() -> None:
    for implementation in ("reference", "xla"):
        assert dispatch.choose_logits(implementation, Objective(), jnp.dtype("float64")) == implementation
    assert dispatch.choose_linear("gathered", Objective(), 64, 65, jnp.dtype("float64")) == "gathered"


def test_the_passes_over_rows() -> None:
    def kernels(implementation: str) -> Any:
        return dispatch.LossCall(Objective(), Vocabulary(19), implementation).kernels

    assert kernels("xla") is xla
    assert kernels("pallas") == pallas.Kernels(interpret=False)
    assert kernels("pallas_interpret") == pallas.Kernels(interpret=True)


def test_kernels_are_chosen_where_arrays_lie_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On eight devices: inside shard_map, not under plain jit, which would gather what is sharded."""
    monkeypatch.setattr(dispatch, "platform", lambda: "cuda")
    chosen = []

    def loss(logits: jax.Array) -> jax.Array:
        chosen.append(dispatch.choose_logits(None, Objective(sft_loss_weight=0.4), logits.dtype))
        return logits

    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    jax.eval_shape(loss, HIDDEN)
    jax.eval_shape(jax.shard_map(loss, mesh=mesh, in_specs=P(None), out_specs=P(None)), HIDDEN)
    assert chosen == ["xla", "pallas"]


def test_checked_mode_names_ids_out_of_range() -> None:
    """Under checkify, ids that a term reads; absent entries, masked positions and unread labels are free."""

    def complaint(function: Any, **changes: Any) -> str:
        error, _ = checkify.checkify(functools.partial(function, **changes), errors=checkify.user_checks)()
        return str(error.get())

    ids, labels, values = INPUTS.topk_token_ids.copy(), INPUTS.labels.copy(), INPUTS.topk_logits.copy()
    ids[1, 2, 3], labels[0, 0], values[1, 2, 3] = 19, -100, -np.inf
    mask = np.ones((2, 3), np.float32)
    for function in (call, functools.partial(call_linear, loss_mask=mask)):
        message = "topk_token_ids holds 19 at row 1, position 2, outside the vocabulary of V = 19"
        assert message in complaint(function, topk_token_ids=ids)
        assert "labels holds -100 at row 0, position 0" in complaint(function, labels=labels, sft_loss_weight=0.4)
        assert complaint(function, labels=labels) == "None"
        assert "labels holds -100 at row 0, position 0" in complaint(function, labels=labels, tail="label")
        assert complaint(function, topk_token_ids=ids, topk_logits=values) == "None"
    mask[1, 2] = 0
    assert complaint(call_linear, topk_token_ids=ids, loss_mask=mask) == "None"


def test_messages_name_the_keys_of_the_configuration() -> None:
    """With the prefix before each setting that they mention."""
    for objective, message in [
        (Objective(kd_loss="kl"), "loss.kd_loss = 'kl' is unknown"),
        (Objective(sft_loss_weight=-1.0), "loss.sft_loss_weight = -1.0 would"),
        (Objective(kd_loss_weight=0), "loss.kd_loss_weight = 0 and loss.sft_loss_weight = 0 leave no loss"),
        (Objective(logits_scale=0), "loss.logits_scale = 0 would"),
        (Objective(jsd_beta=0), "loss.jsd_beta = 0 does not mix"),
        (
            Objective(tail="ghost", target_logits_scale=2),
            "loss.target_logits_scale = 2 does not work with loss.tail = 'ghost'.*"
            "set loss.target_logits_scale = 1 or loss.tail = 'renormalize'",
        ),
        (
            Objective(tail="label", kd_loss="jsd"),
            "loss.kd_loss = 'jsd' does not work with loss.tail = 'label'.*"
            "set loss.kd_loss = 'fwd_kl' or loss.tail = 'renormalize'",
        ),
        (
            Objective(tail="ghost", targets="sampled"),
            "loss.tail = 'ghost' does not work with loss.targets = 'sampled'.*"
            "leave loss.tail = 'renormalize'.* or set loss.targets = 'topk'",
        ),
    ]:
        with pytest.raises(UserError, match=f"^{message}"):
            objective.check("loss.")
    with pytest.raises(UserError, match=r"^loss.implementation = 'fast' is not available; choose one of .*'gathered'"):
        dispatch.check_implementation("fast", Objective(), prefix="loss.")
    with pytest.raises(UserError, match=r"but loss.tail = 'ghost' needs all of .* loss.implementation = None"):
        dispatch.check_implementation("gathered", Objective(tail="ghost"), prefix="loss.")
    dispatch.check_implementation("gathered", Objective(), prefix="loss.")


def test_an_objective_from_the_configuration() -> None:
    settings = LossConfig(kd_loss="jsd", sft_loss_weight=0.3, cross_tokenizer=True, jsd_beta=0.2, reduction="nemo")
    objective = Objective(kd_loss="jsd", sft_loss_weight=0.3, cross_tokenizer="rank_match", jsd_beta=0.2)
    assert Objective.from_settings(settings) == objective
    assert Objective.from_settings(LossConfig(cross_tokenizer=False)) == Objective(cross_tokenizer=None)


def test_objectives_are_hashable() -> None:
    """So that they can be static arguments and share a compiled function."""
    assert len({Objective(), Objective(), Objective(tail="ghost")}) == 2
