"""The peer that kdjax is measured against: the same student and updates in plain eager torch.

The loss of the objectives sft, nemo and kd is NeMo-Aligner's algorithm (its `_TopKLogitsCrossEntropy`, at
tensor-parallel size 1) restated pass by pass. It reads, writes and keeps the same [tokens, vocabulary] arrays, because
they determine time and memory. The ghost objectives, which NeMo-Aligner lacks, use torch's autograd.

    python scripts/benchmarks/torch_peer.py --mode train --objective nemo --steps 100  # a line of JSON per validation
    python scripts/benchmarks/torch_peer.py --mode time --steps 20            # one line of JSON: time and memory

Needs torch and NumPy, not kdjax. `bench_step.py` and `compare_peer.py` start it in a separate process.
"""

import argparse
import gzip
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import host
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RECORDS = Path(__file__).resolve().parents[2] / "data" / "smollm2_topk"

# The student of configs/quickstart.py, as transformers' Llama has it: every matrix drawn with the same deviation.
LAYERS, D, N, G, H, MLP, V = 4, 128, 4, 2, 32, 512, 49152
ROPE_THETA, NORM_EPS, INIT_STD = 1e5, 1e-5, 0.02

# Its updates. Rows a step; nats; the schedule is NeMo's CosineAnnealing without constant steps.
ROWS = 8
LR, MIN_LR, WARMUP, BETAS, ADAM_EPS, DECAY, CLIP = 3e-3, 3e-4, 10, (0.9, 0.98), 1e-8, 0.01, 1.0
LOGITS_SCALE = 1.0


class Objective(NamedTuple):
    """Weights of the two terms, and what becomes of the mass outside the top-k."""

    kd_weight: float
    sft_weight: float
    ghost: bool


OBJECTIVES = {
    "sft": Objective(0.0, 1.0, ghost=False),
    "nemo": Objective(1.0, 0.4, ghost=False),  # the weights of NeMo-Aligner's tutorial
    "kd": Objective(1.0, 0.0, ghost=False),
    "ghost": Objective(1.0, 0.4, ghost=True),
    "ghost_kd": Objective(1.0, 0.0, ghost=True),
}


class Batch(NamedTuple):
    """Records as tensors: [B, T], and [B, T, K] for the teacher's entries."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    topk_logits: Tensor
    topk_token_ids: Tensor
    log_sum_exp_logits: Tensor

    def rows(self, index: Tensor) -> "Batch":
        return Batch(*(field[index] for field in self))


def read_records(path: Path) -> Batch:
    """Reads one .jsonl.gz file."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Batch._fields}
    whole_numbers = ("tokens", "labels", "topk_token_ids")
    with gzip.open(path, "rt") as lines:
        for line in lines:
            record = json.loads(line)
            for name, column in columns.items():
                column.append(np.asarray(record[name], np.int64 if name in whole_numbers else np.float32))
    return Batch(**{name: torch.from_numpy(np.stack(column)) for name, column in columns.items()})


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS))


class Attention(nn.Module):
    """Causal attention; each of the G key/value heads serves N / G query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, N * H, bias=False), nn.Linear(N * H, D, bias=False)
        self.k, self.v = nn.Linear(D, G * H, bias=False), nn.Linear(D, G * H, bias=False)

    def forward(self, x: Tensor, cos_TxH: Tensor, sin_TxH: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, H).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (y * cos_TxH + half_turn(y) * sin_TxH for y in (q, k))
        k, v = (y.repeat_interleave(N // G, dim=1) for y in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, N * H))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.attn, self.mlp_norm = RMSNorm(), Attention(), RMSNorm()
        self.gate, self.up = nn.Linear(D, MLP, bias=False), nn.Linear(D, MLP, bias=False)
        self.down = nn.Linear(MLP, D, bias=False)

    def forward(self, x: Tensor, cos_TxH: Tensor, sin_TxH: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos_TxH, sin_TxH)
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Student(nn.Module):
    """Tokens [B, T] to logits [B, T, V]; the unembedding is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers, self.norm = (
            nn.Embedding(V, D),
            nn.ModuleList(Layer() for _ in range(LAYERS)),
            RMSNorm(),
        )
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        frequency = ROPE_THETA ** (-torch.arange(0, H, 2) / H)
        angle_TxH = (torch.arange(tokens.shape[1])[:, None] * frequency).repeat(1, 2)
        x, cos_TxH, sin_TxH = self.embed(tokens), angle_TxH.cos(), angle_TxH.sin()
        for layer in self.layers:
            x = layer(x, cos_TxH, sin_TxH)
        return F.linear(self.norm(x), self.embed.weight)


def half_turn(x: Tensor) -> Tensor:
    """Returns (-b, a) for the halves (a, b) of each head."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class NemoLoss(torch.autograd.Function):
    """NeMo-Aligner's forward KL on the top-k and cross-entropy, on scaled logits [B, T, V]; losses [B, T].

    The comments count passes over [B, T, V] (R reads, W writes); the caller's scaling adds R+W forward and R+W
    backward. As there, the backward pass assigns gradients by id, so an id must not occur twice at one position,
    and it overwrites the saved softmax, so it runs once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scaled: Tensor,
        topk_logits: Tensor,
        ids: Tensor,
        labels: Tensor,
        kd_weight: float,
        sft_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shifted = scaled - scaled.max(dim=-1, keepdim=True).values  # R, R+W
        log_q = torch.log_softmax(shifted.gather(-1, ids), dim=-1)
        log_p = torch.log_softmax(topk_logits, dim=-1)
        q, p = log_q.exp(), log_p.exp()
        kd = (p * (log_p - log_q)).sum(-1)
        softmax, sft = None, torch.zeros_like(kd)
        if sft_weight > 0:
            softmax = shifted.exp()  # R+W
            total = softmax.sum(-1, keepdim=True)  # R
            sft = (total.log() - shifted.gather(-1, labels[..., None])).squeeze(-1)
            softmax.div_(total)  # R+W
        ctx.save_for_backward(softmax, q - p, ids, labels)
        ctx.weights, ctx.shape = (kd_weight, sft_weight), scaled.shape
        ctx.mark_non_differentiable(kd, sft)
        return kd_weight * kd + sft_weight * sft, kd, sft

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_kd: None, grad_sft: None) -> tuple[Tensor | None, ...]:
        softmax, difference, ids, labels = ctx.saved_tensors
        kd_weight, sft_weight = ctx.weights
        grad = torch.zeros(ctx.shape, device=difference.device)  # W
        grad.scatter_(-1, ids, difference)
        grad *= kd_weight  # R+W
        if softmax is not None:
            is_label = torch.zeros_like(grad)  # W
            is_label.scatter_(-1, labels[..., None], 1.0)
            softmax -= is_label  # 2R+W
            softmax *= sft_weight  # R+W
            grad += softmax  # 2R+W
        grad *= grad_loss[..., None]  # R+W
        return grad, None, None, None, None, None


def ghost_loss(logits: Tensor, batch: Batch, objective: Objective) -> Tensor:
    """Returns forward KL over the top-k and one class for the remaining mass, plus cross-entropy; [B, T]."""
    log_q_BxTxV = torch.log_softmax(logits, dim=-1)
    log_q = with_rest(log_q_BxTxV.gather(-1, batch.topk_token_ids))
    log_p = with_rest(batch.topk_logits - batch.log_sum_exp_logits[..., None])
    sft = -log_q_BxTxV.gather(-1, batch.labels[..., None]).squeeze(-1)
    return objective.kd_weight * (log_p.exp() * (log_p - log_q)).sum(-1) + objective.sft_weight * sft


def with_rest(log_p: Tensor) -> Tensor:
    """Returns K log-probabilities and the logarithm of the remaining mass."""
    log_mass = log_p.logsumexp(-1, keepdim=True).clamp(max=-1e-6)  # stored logits are rounded: a sum may pass 1
    return torch.cat((log_p, torch.log(-torch.expm1(log_mass))), dim=-1)


def token_losses(logits: Tensor, batch: Batch, objective: Objective) -> Tensor:
    """Returns the objective at each position, [B, T]."""
    if objective.ghost:
        return ghost_loss(logits, batch, objective)
    scaled = LOGITS_SCALE * logits
    teacher = batch.topk_logits, batch.topk_token_ids
    return NemoLoss.apply(scaled, *teacher, batch.labels, objective.kd_weight, objective.sft_weight)[0]


def make_optimizer(student: Student) -> torch.optim.AdamW:
    """Returns AdamW that decays matrices only, which is Megatron-Core's rule."""
    parameters = list(student.parameters())
    decayed, spared = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=ADAM_EPS)


def learning_rate(step: int, steps: int) -> float:
    """Returns the learning rate of update number `step`, counted from 0."""
    if step <= WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    share = (step - WARMUP) / (steps - WARMUP)
    return MIN_LR + 0.5 * (LR - MIN_LR) * (1 + math.cos(math.pi * share))


def update(student: Student, optimizer: torch.optim.AdamW, batch: Batch, objective: Objective, lr: float) -> Tensor:
    """Makes one step on one batch; returns the loss before it, a mean over unmasked tokens."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    losses_BxT = token_losses(student(batch.tokens), batch, objective)
    loss = (losses_BxT * batch.loss_mask).sum() / batch.loss_mask.sum()
    loss.backward()
    nn.utils.clip_grad_norm_(student.parameters(), CLIP)
    optimizer.step()
    return loss.detach()


def epochs(records: Batch, seed: int) -> Iterator[Batch]:
    """Batches without end: a new seeded order every epoch, what does not fill a batch left out."""
    count, epoch = len(records.tokens), 0
    while True:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        for start in range(0, count - ROWS + 1, ROWS):
            yield records.rows(order[start : start + ROWS])
        epoch += 1


@torch.no_grad()
def evaluate(student: Student, records: Batch) -> dict[str, float]:
    """Returns the renormalised forward KL and the cross-entropy, means over all unmasked tokens, in nats."""
    kd = sft = tokens = 0.0
    for index in torch.arange(len(records.tokens)).split(ROWS):
        batch = records.rows(index)
        log_q_BxTxV = torch.log_softmax(student(batch.tokens), dim=-1)
        log_q = torch.log_softmax(log_q_BxTxV.gather(-1, batch.topk_token_ids), dim=-1)
        log_p = torch.log_softmax(batch.topk_logits, dim=-1)
        kd += float(((log_p.exp() * (log_p - log_q)).sum(-1) * batch.loss_mask).sum())
        sft -= float((log_q_BxTxV.gather(-1, batch.labels[..., None]).squeeze(-1) * batch.loss_mask).sum())
        tokens += float(batch.loss_mask.sum())
    return {"kd_loss": kd / tokens, "sft_loss": sft / tokens}


def train(arguments: argparse.Namespace) -> None:
    """Prints a line of JSON before the first update, after every `val_every` and after the last."""
    objective, steps = OBJECTIVES[arguments.objective], arguments.steps
    val = read_records(arguments.data / "val_with_logits_0.jsonl.gz")
    student, optimizer, batches = setup(arguments)
    for step in range(steps + 1):
        if step % arguments.val_every == 0 or step == steps:
            print(json.dumps({"step": step, **evaluate(student, val)}), flush=True)
        if step < steps:
            update(student, optimizer, next(batches), objective, learning_rate(step, steps))


def time_steps(arguments: argparse.Namespace) -> None:
    """Prints one line of JSON: the first step apart, the median of the others, and this process's memory."""
    objective, steps = OBJECTIVES[arguments.objective], arguments.steps
    student, optimizer, batches = setup(arguments)
    before, times, losses = host.rss_bytes(), [], []
    for step in range(steps + 1):
        batch = next(batches)
        start = time.perf_counter()
        loss = update(student, optimizer, batch, objective, learning_rate(step, steps + 100))
        times.append(time.perf_counter() - start)
        losses.append(float(loss))
    median = statistics.median(times[1:])
    result = {
        "median_step_s": median,
        "fastest_step_s": min(times[1:]),
        "tokens_per_s": batch.tokens.numel() / median,
        "first_step_s": times[0],
        "peak_rss_bytes": host.peak_rss_bytes(),
        "rss_before_bytes": before,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "versions": f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}",
    }
    print(json.dumps(result), flush=True)


def setup(arguments: argparse.Namespace) -> tuple[Student, torch.optim.AdamW, Iterator[Batch]]:
    """Returns the seeded student, its optimiser and its batches."""
    torch.set_num_threads(host.threads())
    torch.manual_seed(arguments.seed)
    student = Student()
    records = read_records(arguments.data / "train_with_logits_0.jsonl.gz")
    return student, make_optimizer(student), epochs(records, arguments.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("train", "time"), required=True, help="learn, or measure the step")
    parser.add_argument("--objective", choices=OBJECTIVES, default="nemo", help="default: nemo (kd 1 + sft 0.4)")
    parser.add_argument("--steps", type=int, default=100, help="updates (time: besides one untimed); default: 100")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the data's order; default: 0")
    parser.add_argument("--val-every", type=int, default=20, help="updates between validations; default: 20")
    parser.add_argument("--data", type=Path, default=RECORDS, help="directory of the records; default: the bundled")
    arguments = parser.parse_args()
    {"train": train, "time": time_steps}[arguments.mode](arguments)


if __name__ == "__main__":
    main()
