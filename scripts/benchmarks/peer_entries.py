"""The objectives, lengths of training, recorded figures and curves that scripts/benchmarks/compare_peer.py compares."""

import dataclasses

TERMS = {"kd_loss": "kd_loss (renormalised)", "sft_loss": "sft_loss"}


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective, its name in tables and pictures, and its colour."""

    title: str
    label: str
    colour: str
    kd_weight: float
    sft_weight: float
    tail: str = "renormalize"


OBJECTIVES = {
    "sft": Objective("SFT only", "SFT only", "#555555", 0.0, 1.0),
    "nemo": Objective("NeMo-Aligner's loss, kd 1 + sft 0.4", "KD + SFT", "#0072B2", 1.0, 0.4),
    "kd": Objective("NeMo-Aligner's loss, kd only", "KD only", "#D55E00", 1.0, 0.0),
    "ghost": Objective("ghost bucket, kd 1 + sft 0.4", "ghost KD + SFT", "#009E73", 1.0, 0.4, "ghost"),
    "ghost_kd": Objective("ghost bucket, kd only", "ghost KD only", "#B0569A", 1.0, 0.0, "ghost"),
}
VAL_EVERY = {100: 10, 300: 20}  # steps to learn for -> steps between validations

# Validation (kd_loss, sft_loss) in nats per token at the last step. From one run each: transformers' LlamaForCausalLM,
# torch AdamW, two CPU cores, float32, one seed; student, records, batch size and schedule as in configs/quickstart.py,
# except that every matrix starts with deviation 0.02 (kdjax divides by sqrt(2 layers) where a layer writes to the
# residual stream). The kd_loss of all objectives is the renormalised forward KL.
RECORDED = {
    ("sft", 100): (1.502, 6.346),
    ("nemo", 100): (0.781, 6.560),
    ("kd", 100): (0.588, 10.428),
    ("sft", 300): (1.589, 5.934),
    ("nemo", 300): (0.802, 5.887),
    ("ghost", 300): (1.258, 5.761),
    ("ghost_kd", 300): (1.228, 5.782),
}

ENTRIES = {f"{name}:{steps}": (name, steps) for name, steps in RECORDED}


@dataclasses.dataclass(frozen=True)
class Point:
    """A validation: nats per token, kd_loss renormalised whatever was minimised."""

    step: int
    kd_loss: float
    sft_loss: float


Groups = dict[tuple[str, str, int], list[list[Point]]]  # (side, objective, column) -> a curve a seed
