"""A teacher on the student's mesh: the step beside float64, and runs that learn, resume and are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_problem as toy

from kdjax import config as configs
from kdjax.checkpoint import lay_out, load_teacher, read_teacher, save_model
from kdjax.config import Config, MeshConfig, ModelConfig
from kdjax.config.validate import resolve, resolve_model, validate
from kdjax.data.dataset import open_dataset
from kdjax.model import bind, init_params
from kdjax.parallel import mesh as meshes
from kdjax.train import run
from kdjax.training.layout import Layout
from kdjax.training.step import make_eval_step, make_train_step
from kdjax.types import Batch, UserError

pytestmark = pytest.mark.slow

T, VOCAB = 7, 61
STUDENT = {"layers": 2, "n_heads": 4, "head_dim": 4, "vocab_size": VOCAB, "padded_vocab_size": 64}
ONE, EIGHT = (1, 1, 1, 1), (2, 2, 1, 2)  # pipe, data, fsdp, tensor


def save_teacher(directory: Path, **changes: Any) -> str:
    """Another width, depth and padding than the student's."""
    settings: dict[str, Any] = {
        "layers": 4, "d_model": 24, "n_heads": 4, "n_groups": 2, "d_ff": 32, "vocab_size": VOCAB, "tied": False,
        "init_std": 0.5, "padded_vocab_size": 69, "qk_norm": True,
    }  # fmt: skip
    model = resolve_model(ModelConfig(**(settings | changes)))
    save_model(directory / "teacher", model, init_params(model, 3))
    return str(directory / "teacher")


def the_config(directory: Path, mesh: tuple[int, int, int, int] = ONE, microbatches: int = 2, **changes: Any) -> Config:
    settings: dict[str, Any] = {f"model__{name}": value for name, value in STUDENT.items()}
    settings |= {"optim__name": "sgd", "optim__b1": 0.0, "optim__weight_decay": 0.0, "optim__clip_norm": None}
    settings |= {f"mesh__{axis}": size for axis, size in MeshConfig(*mesh).sizes.items()}
    settings |= {"batch__global_size": 2 * microbatches * mesh[1] * mesh[2], "data__sequence_length": T}
    settings |= {"teacher__dtype": "float32"}
    if "teacher__checkpoint" not in changes:
        settings["teacher__checkpoint"] = save_teacher(directory)
    return resolve(toy.config(directory, **settings | changes))


def the_layout(config: Config) -> Layout:
    validate(config)
    devices = jax.devices()[: int(np.prod(list(config.mesh.sizes.values())))]
    return lay_out(config, read_teacher(config), meshes.make_mesh(config.mesh.sizes, devices))


def made_batch(rows: int, packed: bool = False) -> Batch:
    """Rows with masked positions, whose labels and tokens after the last unmasked one are garbage."""
    rng = np.random.default_rng(rows)
    mask = (rng.uniform(size=(rows, T)) < 0.7).astype(np.float32)
    mask[0] = 1
    labels = rng.integers(VOCAB, size=(rows, T)).astype(np.int32)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T))
    second = places >= 3
    return Batch(
        tokens=rng.integers(VOCAB, size=(rows, T)).astype(np.int32),
        labels=np.where(mask > 0, labels, 10**6).astype(np.int32),
        loss_mask=mask,
        topk_logits=np.zeros((rows, T, 0), np.float32),
        topk_token_ids=np.zeros((rows, T, 0), np.int32),
        positions=np.where(second, places - 3, places).astype(np.int32) if packed else None,
        segment_ids=second.astype(np.int32) if packed else None,
    )


def restated(config: Config, layout: Layout, batch: Batch) -> tuple[dict[str, float], Any]:
    """kd, sft and the gradient of the loss, in float64 throughout, from all logits at once."""
    assert layout.teacher is not None
    loss, taught_by = config.loss, load_teacher(layout)
    s, b = loss.logits_scale, loss.jsd_beta

    def logits(model: ModelConfig, params: Any) -> jax.Array:
        model = dataclasses.replace(model, dtype="float64", param_dtype="float64", remat="none")
        bound = bind(model, params)
        hidden = bound.hidden(batch.tokens, batch.positions, batch.segment_ids)
        return hidden @ bound.unembedding()[:VOCAB].T

    def terms(params: Any, teacher: Any) -> tuple[jax.Array, Any]:
        log_q = jax.nn.log_softmax(s * logits(config.model, params))
        log_p = jax.nn.log_softmax(loss.target_logits_scale * logits(layout.teacher.config.model, teacher))
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        log_m = jnp.log(b * p + (1 - b) * q)
        kd = {
            "fwd_kl": (p * (log_p - log_q)).sum(-1),
            "bwd_kl": (q * (log_q - log_p)).sum(-1),
            "jsd": (b * p * (log_p - log_m) + (1 - b) * q * (log_q - log_m)).sum(-1),
        }[loss.kd_loss]
        labels = np.where(batch.loss_mask > 0, batch.labels, 0)
        sft = -jnp.take_along_axis(log_q, labels[..., None], -1)[..., 0]
        kd, sft = ((batch.loss_mask * x).sum() / batch.loss_mask.sum() for x in (kd, sft))
        return loss.kd_loss_weight * kd + loss.sft_loss_weight * sft, {"kd_loss": kd, "sft_loss": sft}

    params = init_params(config.model, jax.random.key(config.train.seed))
    with jax.enable_x64(True):
        params, taught_by = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, jax.device_get(taught_by)))
        (total, means), gradient = jax.value_and_grad(terms, has_aux=True)(params, taught_by)
        return jax.tree.map(np.asarray, ({"loss": total, **means}, gradient))


CASES: list[tuple[tuple[int, int, int, int], dict[str, Any]]] = [
    (ONE, {"loss__kd_loss": "fwd_kl"}),
    (ONE, {"loss__kd_loss": "bwd_kl", "loss__sft_loss_weight": 0.0, "loss__implementation": "reference"}),
    (ONE, {"loss__kd_loss": "jsd", "loss__target_logits_scale": 0.8, "loss__implementation": "xla"}),
    (EIGHT, {"loss__kd_loss": "fwd_kl", "loss__sft_loss_weight": 0.0, "data__pack": True}),
    (EIGHT, {"loss__kd_loss": "bwd_kl", "loss__logits_scale": 0.7, "model__tied": False}),
    (EIGHT, {"loss__kd_loss": "jsd", "loss__jsd_beta": 0.3, "mesh__schedule": "gpipe"}),
    ((2, 1, 2, 2), {"loss__kd_loss": "jsd", "mesh__interleave": 2, "model__layers": 4}),
]


@pytest.mark.parametrize(("mesh", "changes"), CASES, ids=str)
def test_loss_and_gradient(mesh: tuple[int, int, int, int], changes: dict[str, Any], tmp_path: Path) -> None:
    config = the_config(tmp_path, mesh, 3, **changes)
    layout = the_layout(config)
    batch = made_batch(config.batch.global_size, config.data.pack)
    expected, gradient = restated(config, layout, batch)
    state, teacher, on_mesh = layout.init_state(), load_teacher(layout), meshes.put_rows(layout.mesh, batch)
    judged = make_eval_step(layout)(state.params, on_mesh, teacher)
    state, metrics = make_train_step(layout)(state, on_mesh, teacher)
    for name, value in expected.items():
        np.testing.assert_allclose(judged[name].mean, value, rtol=1e-5, err_msg=name)
        if name != "sft_loss" or config.loss.sft_loss_weight:
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    assert metrics["tokens"] == batch.loss_mask.sum()
    found = dict(jax.tree.leaves_with_path(optax.tree.get(state.opt_state, "trace")))
    for path, truth in jax.tree.leaves_with_path(gradient):
        assert np.abs(found[path] - truth).max() < 1e-5 * np.abs(truth).max(), path


def test_a_twin_has_nothing_to_teach(tmp_path: Path) -> None:
    config = the_config(tmp_path, EIGHT, loss__sft_loss_weight=0.0, teacher__checkpoint=None)
    save_model(tmp_path / "twin", config.model, init_params(config.model, jax.random.key(config.train.seed)))
    config = configs.replace(config, teacher__checkpoint=str(tmp_path / "twin"))
    layout = the_layout(config)
    batch = meshes.put_rows(layout.mesh, made_batch(config.batch.global_size))
    _, metrics = make_train_step(layout)(layout.init_state(), batch, load_teacher(layout))
    assert abs(metrics["kd_loss"]) < 1e-6
    assert metrics["grad_norm"] < 1e-6
    assert metrics["top1_agreement"] == 1


def test_the_teacher_is_sharded_frozen_and_in_its_own_dtype(tmp_path: Path) -> None:
    """A quarter of it on each of pipe 2 x tensor 2, in bfloat16; it is no part of the state, and a step leaves it."""
    config = the_config(tmp_path, EIGHT, teacher__dtype="bfloat16")
    layout = the_layout(config)
    teacher = load_teacher(layout)
    whole = sum(x.size for x in jax.tree.leaves(teacher))
    held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(teacher))
    assert whole / 4 <= held < 1.1 * whole / 4
    assert {x.dtype for x in jax.tree.leaves(teacher)} == {jnp.dtype("bfloat16")}
    before = jax.device_get(teacher)
    state, _ = make_train_step(layout)(
        layout.init_state(), meshes.put_rows(layout.mesh, made_batch(config.batch.global_size)), teacher
    )
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(teacher))
    alone = Layout(config, layout.mesh).init_state()
    assert jax.tree.map(jnp.shape, alone) == jax.tree.map(jnp.shape, state)


def test_a_step_holds_no_logits_of_a_microbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither whole nor stacked over microbatches; with the hidden states of the teacher, once."""
    monkeypatch.setitem(__import__("kdjax.losses.fused.linear", fromlist=["x"]).DENSE_CHUNK_TOKENS, "cpu", 8)
    vocab, length = 4096, 64
    path = save_teacher(tmp_path, vocab_size=vocab, padded_vocab_size=vocab)
    sizes = {"model__vocab_size": vocab, "model__padded_vocab_size": vocab, "data__sequence_length": length}
    config = the_config(tmp_path, teacher__checkpoint=path, **sizes)
    layout = the_layout(config)
    assert layout.teacher is not None
    arguments = layout.abstract_state(), layout.abstract_batch(5), layout.teacher.abstract_params()
    program = make_train_step(layout).lower(*arguments).compile()
    text, n = program.as_text(), 2 * length
    for shape in (f"[{n},{vocab}]", f"[2,{length},{vocab}]", f"[{n // 8},8,{vocab}]"):
        assert shape not in text
    assert f"[8,{vocab}]" in text
    unembedding = 4 * vocab * config.model.d_model
    assert program.memory_analysis().temp_size_in_bytes < 6 * 4 * 8 * vocab + 6 * unembedding < 2 * 4 * n * vocab


def text_only(directory: Path) -> None:
    """Leaves tokens, labels and loss mask in the records."""
    for path in (directory / "train.jsonl", directory / "val.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{k: line[k] for k in ("tokens", "labels", "loss_mask")} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def running(directory: Path, **changes: Any) -> Config:
    """A run on records without entries."""
    path = save_teacher(directory)
    config = toy.config(directory, teacher__checkpoint=path, teacher__dtype="float32", **changes)
    text_only(directory)
    return config


def test_a_run_learns_and_resumes_bit_by_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = running(tmp_path, loss__sft_loss_weight=0.0, train__steps=12)
    one = jax.devices()[:1]
    whole = run(config, tmp_path / "whole", devices=one)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    judged = [line["kd_loss"] for line in lines if line["split"] == "val"]
    assert judged[-1] < 0.95 * judged[0]
    out = capsys.readouterr().out
    assert f"learns from {tmp_path / 'teacher'} on the mesh (" in out
    assert "fwd_kl over all 61 token ids" in out
    assert "a teacher on the mesh takes the place of cached entries" in out

    first = run(config, tmp_path / "halves", toy.StopAfter(5), one)
    assert first.ended == "interrupted"
    second = run(config, tmp_path / "halves", devices=one)
    jax.tree.map(np.testing.assert_array_equal, second.state, whole.state)

    other = configs.replace(config, teacher__checkpoint=str(tmp_path / "other"))
    (tmp_path / "teacher").rename(tmp_path / "other")
    with pytest.raises(UserError, match=r"teacher.checkpoint: '.*teacher' in the run, '.*other' now"):
        run(other, tmp_path / "halves", devices=one)


def test_records_without_entries_are_for_a_teacher_only(tmp_path: Path) -> None:
    config = running(tmp_path)
    with pytest.raises(UserError, match="no field topk_logits, topk_token_ids"):
        open_dataset(config.data.train, config.data, vocab_size=VOCAB)
    assert open_dataset(config.data.train, config.data, vocab_size=VOCAB, targets=None).top_k == 0


def test_stored_entries_are_ignored(tmp_path: Path) -> None:
    """Whatever they hold."""
    config = toy.config(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"topk_logits": "nonsense", "topk_token_ids": None, "log_sum_exp_logits": [float("nan")]}
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = open_dataset(config.data.val, config.data, vocab_size=VOCAB, targets=None)
    record = found[0]
    assert (record.topk_logits.shape, record.log_sum_exp_logits) == ((len(record), 0), None)
    assert not found.has_log_sum_exp


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss__tail": "ghost"}, "loss.tail = 'ghost' is about cached entries"),
        ({"loss__tail": "label"}, "loss.tail = 'label' is about cached entries"),
        ({"loss__targets": "sampled"}, "loss.targets = 'sampled' is about cached entries"),
        ({"loss__cross_tokenizer": "rank_match"}, "loss.cross_tokenizer = 'rank_match' is about cached entries"),
        ({"loss__implementation": "pallas"}, "loss.implementation = 'pallas'.*use xla or none"),
        ({"loss__implementation": "gathered", "loss__sft_loss_weight": 0.0}, "loss.implementation = 'gathered'"),
        ({"loss__include_vocab_padding": True}, "loss.include_vocab_padding = True.*set it to False"),
        ({"loss__kd_loss_weight": 0.0}, "loss.kd_loss_weight = 0.0: .*leave teacher.checkpoint unset"),
        ({"data__top_k": 5}, "data.top_k = 5: it is about cached entries.*set it to None"),
        ({"data__kind": "probs"}, "data.kind = 'probs': .*set it to logits"),
        ({"model__vocab_size": 60}, "has a vocabulary of 61 ids and the student one of 60.*model.vocab_size=61"),
        ({"model__tokenizer_sha256": "b" * 64}, "has the tokenizer aaaa.*cross_tokenizer=rank_match"),
        ({"teacher__checkpoint": "/nowhere"}, "teacher.checkpoint = '/nowhere' holds neither"),
        (
            {"mesh__pipe": 8, "model__layers": 8},
            r"teacher.checkpoint = .* In terms of the teacher's model, mesh.pipe = 8",
        ),
        ({"data__sequence_length": 8}, "data.sequence_length = 8: teacher.checkpoint = .* has 7 learned positions"),
    ],
    ids=str,
)
def test_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    learned = {"position": "learned", "max_positions": T} if "data__sequence_length" in changes else {}
    path = save_teacher(tmp_path, tokenizer_sha256="a" * 64, **learned)
    with pytest.raises(UserError, match=message):
        the_layout(the_config(tmp_path, **{"teacher__checkpoint": path} | changes))
