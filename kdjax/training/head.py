"""The end of a microbatch's forward pass: final norm, loss, and the sums that metrics are made of."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kdjax.losses import LossSums, Objective, Supervision, TeacherStates, TeacherSums, linear_losses, teacher_losses
from kdjax.model import Params, bind
from kdjax.parallel.axes import VOCABULARY_AXES
from kdjax.training.layout import Layout
from kdjax.types import Batch, SumCount

Sums = dict[str, SumCount]


@dataclasses.dataclass(frozen=True)
class Head:
    """Losses of the residual stream after the last layer, [B, T, D], for one microbatch; only inside `per_device`."""

    layout: Layout
    teacher_unembed: jax.Array | None = None  # this device's rows of it, [W, E], if a teacher runs on the mesh

    @functools.cached_property
    def objective(self) -> Objective:
        """What `config.loss` minimises."""
        return Objective.for_records(self.layout.config.loss)

    def train(self, shared: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """Returns the microbatch's share of what is minimised and its sums.

        What is minimised is divided once, at the end, by the summed count of "loss".
        """
        sums = self._loss_sums(self.objective, shared, y, batch)
        metrics = self._by_token(sums, batch)
        if self.layout.config.loss.reduction == "nemo":  # each microbatch counts as one, however many tokens it holds
            for name in ("loss", "kd_loss", "sft_loss"):
                metrics[name] = SumCount(metrics[name].sum / jnp.maximum(sums.tokens, 1), jnp.ones(()))
        return metrics["loss"].sum, metrics

    def evaluate(self, shared: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """Returns the same for validation: both terms whatever their weights, always as means over tokens."""
        both_terms = dataclasses.replace(self.objective, kd_loss_weight=1.0, sft_loss_weight=1.0)
        sums = self._loss_sums(both_terms, shared, y, batch)
        loss = self.objective.kd_loss_weight * sums.kd_loss + self.objective.sft_loss_weight * sums.sft_loss
        return loss, self._by_token(sums._replace(loss=loss), batch)

    def _loss_sums(self, objective: Objective, shared: Params, y: jax.Array, batch: Batch) -> LossSums | TeacherSums:
        config, shards = self.layout.config, self.layout.shards
        model = bind(config.model, shared, shards)
        implementation = config.loss.implementation
        if implementation == "gathered" and objective.sft_loss_weight != 0:
            implementation = None  # validation measures the SFT term too, which K gathered rows cannot tell
        hidden_BxTxD = model.final_norm(y)
        unembed_WxD = model.unembedding().astype(hidden_BxTxD.dtype)
        axes = VOCABULARY_AXES if shards.vocabulary > 1 else None
        if self.teacher_unembed is not None:
            assert batch.teacher_hidden is not None
            return teacher_losses(
                objective,
                hidden_BxTxD,
                unembed_WxD,
                TeacherStates(batch.teacher_hidden, self.teacher_unembed),
                batch.labels,
                batch.loss_mask,
                axis_name=axes,
                vocab_size=config.model.vocab_size,
                implementation=implementation,
            )
        return linear_losses(
            objective,
            hidden_BxTxD,
            unembed_WxD,
            Supervision(
                batch.topk_logits, batch.topk_token_ids, batch.labels, batch.log_sum_exp_logits, batch.topk_weights
            ),
            batch.loss_mask,
            axis_name=axes,
            vocab_size=None if config.loss.include_vocab_padding else config.model.vocab_size,
            implementation=implementation,
        )

    def _by_token(self, sums: LossSums | TeacherSums, batch: Batch) -> Sums:
        """Returns the loss sums and the teacher's statistics, each with the microbatch's tokens as its count."""
        totals = {name: total for name, total in sums._asdict().items() if total is not None}
        tokens = totals.pop("tokens")
        if "teacher_entropy" not in totals:
            totals["teacher_entropy"] = _masked_sum(batch, self._teacher_entropy(batch))
        if batch.log_sum_exp_logits is not None and not self.objective.sampled:
            log_mass_BxT = jax.nn.logsumexp(batch.topk_logits, axis=-1) - batch.log_sum_exp_logits
            totals["teacher_topk_mass"] = _masked_sum(batch, jnp.exp(log_mass_BxT))
        return {name: SumCount(total, tokens) for name, total in totals.items()}

    def _teacher_entropy(self, batch: Batch) -> jax.Array:
        """Returns the entropy of the teacher over its entries, or, if these are draws, an estimate of all of it."""
        if self.objective.sampled:
            assert batch.log_sum_exp_logits is not None
            assert batch.topk_weights is not None
            log_p_BxTxK, p_BxTxK = batch.topk_logits - batch.log_sum_exp_logits[..., None], batch.topk_weights
        else:
            scale = self.objective.target_logits_scale
            log_p_BxTxK = jax.nn.log_softmax(scale * batch.topk_logits.astype(jnp.float32))
            p_BxTxK = jnp.exp(log_p_BxTxK)
        return -jnp.sum(jnp.where(jnp.isneginf(log_p_BxTxK), 0, p_BxTxK * log_p_BxTxK), axis=-1)


def _masked_sum(batch: Batch, values_BxT: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(batch.loss_mask > 0, batch.loss_mask * values_BxT, 0))
