"""Times NeMo-Aligner's loss, restated in eager torch (`torch_peer.NemoLoss`), on random inputs for bench_loss.py.

    python scripts/benchmarks/torch_loss.py --level linear --sft 0.4 --shape 1024 32768 512 64 --repeats 5

Prints one line of JSON: the seconds of each repeat, and the bytes by which the first repeat raised the peak memory
above the inputs. Needs torch and NumPy, but not kdjax.
"""

import argparse
import json
import time

import host
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_peer import NemoLoss


def inputs(shape: tuple[int, int, int, int], device: str) -> list[Tensor]:
    """Returns hidden [1, N, D], unembed [V, D], topk_logits and distinct ids [1, N, K], labels [1, N]."""
    n, v, d, k = shape
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((1, n, d), np.float32)
    unembed = 0.05 * rng.standard_normal((v, d), np.float32)
    ids = (rng.integers(0, v, (1, n, 1)) + np.arange(k) * (v // k)) % v
    topk_logits = rng.standard_normal((1, n, k), np.float32)
    return [torch.from_numpy(x).to(device) for x in (hidden, unembed, topk_logits, ids, ids[..., 0].copy())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=("linear", "logits"), required=True)
    parser.add_argument("--sft", type=float, required=True, help="weight of the SFT term; 0 leaves it out")
    parser.add_argument("--shape", type=int, nargs=4, required=True, metavar=("N", "V", "D", "K"))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, unembed, topk_logits, ids, labels = inputs(tuple(arguments.shape), device)
    logits = F.linear(hidden, unembed) if arguments.level == "logits" else None

    def step() -> None:
        if logits is not None:
            leaves = [logits.detach().requires_grad_()]
            z = leaves[0]
        else:
            leaves = [hidden.detach().requires_grad_(), unembed.detach().requires_grad_()]
            z = F.linear(*leaves)
        loss, _, _ = NemoLoss.apply(z * 1.0, topk_logits, ids, labels, 1.0, arguments.sft)
        torch.autograd.grad(loss.sum(), leaves)
        if device == "cuda":
            torch.cuda.synchronize()

    added = 0
    seconds = []
    for repeat in range(arguments.repeats + 1):
        if repeat == 0 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        elif repeat == 0:
            host.forget_peak()
            before = host.rss_bytes()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        if repeat == 0:
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else host.recorded_peak_bytes()
            added = peak - before
    print(
        json.dumps({"seconds": seconds[1:], "added_bytes": added, "version": f"torch {torch.__version__} on {device}"})
    )


if __name__ == "__main__":
    main()
