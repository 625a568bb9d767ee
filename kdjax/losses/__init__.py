"""The distillation losses of a student against a teacher's cached top-k logits."""

from kdjax.losses.api import linear_topk_kd_loss, topk_kd_loss
from kdjax.losses.objective import LossSums

__all__ = ["LossSums", "linear_topk_kd_loss", "topk_kd_loss"]
