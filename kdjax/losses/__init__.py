"""The distillation losses of a student against a teacher's cached top-k logits, or against a teacher beside it.

`reference.py` specifies them. A gradient by hidden states and unembedding on a CPU passes through `api.py` (checks),
`dispatch.py` (choice of an implementation), `fused/linear.py` (chunks), `fused/dense.py` (one chunk), `vocabulary.py`
(shards), `rows/xla.py` (one pass over the logits) and `closed_form.py` (losses and derivatives of one position).
"""

from kdjax.losses.api import linear_losses, linear_topk_kd_loss, teacher_losses, topk_kd_loss
from kdjax.losses.objective import LossSums, Objective, Supervision, TeacherStates, TeacherSums

__all__ = [
    "LossSums",
    "Objective",
    "Supervision",
    "TeacherStates",
    "TeacherSums",
    "linear_losses",
    "linear_topk_kd_loss",
    "teacher_losses",
    "topk_kd_loss",
]
