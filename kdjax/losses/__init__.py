"""The distillation losses of a student against a teacher's cached top-k logits."""

from kdjax.losses.api import linear_losses, linear_topk_kd_loss, topk_kd_loss
from kdjax.losses.objective import LossSums, Objective, Supervision

__all__ = ["LossSums", "Objective", "Supervision", "linear_losses", "linear_topk_kd_loss", "topk_kd_loss"]
