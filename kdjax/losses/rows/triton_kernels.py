"""The two kernels of `triton.py` for one row of logits, in Triton's language, with `closed_form.py` restated for them.

The settings arrive as an `Objective` that is a constant to the compiler, which drops the branches not taken. Letters
beside the usual ones: N rows, one program each; C = K + 1 columns, the label's last; E the same padded to a power of
two, because Triton has no other sizes; J of them at a time; R and L the rows and lanes of the sweep's tile.
"""

import math

import triton
import triton.language as tl

from kdjax.losses import reference

ABSENT = tl.constexpr(reference.ABSENT)
MAX_LOG_MASS = tl.constexpr(reference.MAX_LOG_MASS)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's; -inf can be subtracted from it, unlike from -inf
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def sweep(
    logits_NxV,
    columns_NxC,
    n_valid_N,  # read where PADDED
    t_NxK,  # the teacher's logits, read where TAUGHT
    t_lse_N,  # its logsumexp, read where TAUGHT if the objective needs it
    w_NxK,  # the weights of sampled targets, read where TAUGHT
    topk_NxK,  # written, like all that follow
    label_N,
    row_max_N,  # where LOG_SUM, without the entries for the ghost
    log_sum_N,  # where LOG_SUM, likewise
    kd_N,  # where TAUGHT, which the ghost is not
    without_entries_NxV,  # for the ghost where LOG_SUM; the memory of logits_NxV
    OBJECTIVE: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    LOG_SUM: tl.constexpr,
    PADDED: tl.constexpr,
    TAUGHT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * V may pass 2^31
    logits_V = logits_NxV + row * V
    e = tl.arange(0, E)
    column_E = tl.load(columns_NxC + row * (K + 1) + e, mask=e < K, other=V)
    z_E = tl.load(logits_V + column_E, mask=column_E < V, other=float("nan")).to(tl.float32)
    tl.store(topk_NxK + row * K + e, z_E, mask=e < K)
    label_column = tl.load(columns_NxC + row * (K + 1) + K)
    z_label = tl.load(logits_V + label_column, mask=label_column < V, other=float("nan")).to(tl.float32)
    tl.store(label_N + row, z_label)

    row_max = 0.0
    log_sum = 0.0
    if LOG_SUM:
        n_valid = V
        if PADDED:
            n_valid = tl.load(n_valid_N + row)
        if OBJECTIVE.ghost:
            logits_V = without_entries_NxV + row * V
            tl.debug_barrier()  # all threads have loaded the entries
            tl.store(logits_V + column_E, tl.full((E,), float("-inf"), tl.float32), mask=column_E < V)
            tl.debug_barrier()  # and read what others have written
        row_max, log_sum = _row_log_sum(logits_V, n_valid, OBJECTIVE, V, R, L, PADDED)
        tl.store(row_max_N + row, row_max)
        tl.store(log_sum_N + row, log_sum)
    if TAUGHT:
        t_E = tl.load(t_NxK + row * K + e, mask=e < K, other=float("-inf")).to(tl.float32)
        normalisers = _normalisers(t_E, z_E, t_lse_N + row, row_max, log_sum, OBJECTIVE)
        kd = _kd(t_E, z_E, z_label, w_NxK + row * K, e, normalisers, K, OBJECTIVE)
        tl.store(kd_N + row, kd)


@triton.jit
def _row_log_sum(
    logits_V, n_valid, OBJECTIVE: tl.constexpr, V: tl.constexpr, R: tl.constexpr, L: tl.constexpr, PADDED: tl.constexpr
):
    """Returns the row's maximum m and log sum_v exp(logits_scale (z_v - m)), both -inf if no logit is finite."""
    tile_RxL = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]
    max_L = tl.full((L,), LOWEST, tl.float32)
    sum_L = tl.zeros((L,), tl.float32)
    whole = n_valid // (R * L) * (R * L)
    for start in tl.range(0, whole, R * L):
        z_RxL = tl.load(logits_V + start + tile_RxL).to(tl.float32)
        max_L, sum_L = _absorb(max_L, sum_L, z_RxL, OBJECTIVE)
    for start in tl.range(whole, n_valid, R * L):  # once, or not at all
        column_RxL = start + tile_RxL
        z_RxL = tl.load(logits_V + column_RxL, mask=column_RxL < V, other=float("-inf")).to(tl.float32)
        if PADDED:  # not in the load's mask, where a variable would make the load two bytes wide
            z_RxL = tl.where(column_RxL < n_valid, z_RxL, float("-inf"))
        max_L, sum_L = _absorb(max_L, sum_L, z_RxL, OBJECTIVE)
    row_max = tl.max(max_L, axis=0)
    row_sum = tl.sum(sum_L * tl.exp2(OBJECTIVE.logits_scale * LOG2_E * (max_L - row_max)), axis=0)
    return tl.where(row_sum == 0, float("-inf"), row_max), tl.log(row_sum)


@triton.jit
def _absorb(max_L, sum_L, z_RxL, OBJECTIVE: tl.constexpr):
    """Returns the lanes' running maxima and sums after R more logits each, which lie in one thread's registers."""
    new_L = tl.maximum(max_L, tl.max(z_RxL, axis=0))
    sum_L *= tl.exp2(OBJECTIVE.logits_scale * LOG2_E * (max_L - new_L))
    sum_L += tl.sum(tl.exp2(OBJECTIVE.logits_scale * LOG2_E * (z_RxL - new_L[None, :])), axis=0)
    return new_L, sum_L


@triton.jit
def spread(
    logits_NxV,
    columns_NxC,
    n_valid_N,  # read where PADDED
    t_NxK,
    t_lse_N,  # read where the objective needs the teacher's logsumexp
    w_NxK,  # read for sampled targets
    topk_NxK,
    label_N,
    row_max_N,  # read where the objective needs the log-sum
    log_sum_N,  # read where the objective needs the log-sum
    tail_max_N,  # read for the ghost
    tail_log_sum_N,  # read for the ghost
    kd_ct_N,
    sft_ct_N,
    logits_ct_NxV,  # written; may be logits_NxV
    OBJECTIVE: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    J: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns_C, t_K, topk_K = columns_NxC + row * (K + 1), t_NxK + row * K, topk_NxK + row * K
    kd_ct = tl.load(kd_ct_N + row)
    sft_ct = tl.load(sft_ct_N + row)
    row_max = 0.0
    log_sum = 0.0
    tail_max = 0.0
    tail_log_sum = 0.0
    if OBJECTIVE.needs_log_sum:
        row_max = tl.load(row_max_N + row)
        log_sum = tl.load(log_sum_N + row)
    if OBJECTIVE.ghost:
        tail_max = tl.load(tail_max_N + row)
        tail_log_sum = tl.load(tail_log_sum_N + row)
    e = tl.arange(0, E)
    t_E, z_E = _entries(t_K, topk_K, e, K)
    normalisers = _normalisers(t_E, z_E, t_lse_N + row, row_max, log_sum, OBJECTIVE)
    w_K = w_NxK + row * K
    cts = _cotangents(t_E, z_E, w_K, e, normalisers, (tail_max, tail_log_sum), (kd_ct, sft_ct), K, OBJECTIVE)
    common, label_ct, log_sum_ct, tail_ct = cts

    # Through the log-sums a column receives a factor times exp(logits_scale (z - centre)).
    at_topk = 0.0
    if OBJECTIVE.needs_log_sum:
        at_topk = OBJECTIVE.logits_scale * _times(log_sum_ct, tl.exp(-log_sum))
    factor = at_topk
    centre = row_max
    if OBJECTIVE.ghost:  # in the tail, which the entries are not in
        factor = OBJECTIVE.logits_scale * _times(tail_ct, tl.exp(-tail_log_sum))
        centre = tl.where(tail_max == float("-inf"), 0.0, tail_max)
    n_valid = V
    if PADDED:
        n_valid = tl.load(n_valid_N + row)
    logits_ct_V = logits_ct_NxV + row * V
    _stream(logits_NxV + row * V, logits_ct_V, factor, centre, n_valid, OBJECTIVE, V, BLOCK)

    # Once every thread has written its part, overwrite the taught columns, each with the sum over its duplicates.
    tl.debug_barrier()
    column_E = tl.load(columns_C + e, mask=e <= K, other=V)
    ct_ExJ = tl.zeros((E, J), tl.float32)
    for start in tl.range(0, K + 1, J):
        j = start + tl.arange(0, J)
        t_J, z_J = _entries(t_K, topk_K, j, K)
        ct_J = tl.where(j == K, label_ct, _topk_ct(t_J, z_J, w_K, j, normalisers, common, kd_ct, K, OBJECTIVE))
        column_J = tl.load(columns_C + j, mask=j <= K, other=-1)
        ct_ExJ += tl.where(column_E[:, None] == column_J[None, :], ct_J[None, :], 0.0)
    ct_E = tl.sum(ct_ExJ, axis=1)
    if OBJECTIVE.needs_log_sum:
        has_entry = tl.max(tl.where((column_E == tl.load(columns_C + K)) & (e < K), 1, 0), axis=0) != 0
        in_tail_E = (e == K) & (has_entry == 0)
        z_E = tl.where(e == K, tl.load(label_N + row), z_E)
        z_E -= tl.where(in_tail_E, centre, row_max)
        ct_E += _times(tl.where(in_tail_E, factor, at_topk), _exp(z_E, OBJECTIVE))
    tl.store(logits_ct_V + column_E, ct_E, mask=column_E < V)


@triton.jit
def _stream(
    logits_V, logits_ct_V, factor, centre, n_valid, OBJECTIVE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes the softmax part of the row; if the factor is 0, writes zeros without reading the logits."""
    # As a product, so that the compiler sees its divisors and loads masked by it stay 16 bytes wide.
    readable = V * (factor != 0).to(tl.int32)
    centre = tl.where(factor == 0, 0.0, centre)  # that of a masked row may be NaN
    whole = n_valid // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):
        column = start + tl.arange(0, BLOCK)
        ct = _dense_ct(logits_V, column, readable, factor, centre, OBJECTIVE)
        tl.store(logits_ct_V + column, ct)
    for start in tl.range(whole, V, BLOCK):  # the ragged block and all padding
        column = start + tl.arange(0, BLOCK)
        ct = _dense_ct(logits_V, column, readable, factor, centre, OBJECTIVE)
        tl.store(logits_ct_V + column, tl.where(column < n_valid, ct, 0.0), mask=column < V)


@triton.jit
def _dense_ct(logits_V, column, readable, factor, centre, OBJECTIVE: tl.constexpr):
    if OBJECTIVE.needs_log_sum:
        z = tl.load(logits_V + column, mask=column < readable, other=0.0).to(tl.float32)
        ct = factor * _exp(z - centre, OBJECTIVE)
    else:
        ct = tl.zeros(column.shape, tl.float32)
    return ct


@triton.jit
def _exp(z, OBJECTIVE: tl.constexpr):
    return tl.exp2(OBJECTIVE.logits_scale * LOG2_E * z)


@triton.jit
def _entries(t_K, topk_K, e, K: tl.constexpr):
    """Returns the teacher's and the student's logits of entries e; entries from K on are absent."""
    t = tl.load(t_K + e, mask=e < K, other=float("-inf")).to(tl.float32)
    return t, tl.load(topk_K + e, mask=e < K, other=float("nan"))


@triton.jit
def _normalisers(t_E, z_E, t_lse, row_max, log_sum, OBJECTIVE: tl.constexpr):
    """Returns centre and log-sum of the teacher's log-probabilities, then of the student's."""
    if OBJECTIVE.needs_teacher_log_sum:
        t_centre = tl.load(t_lse).to(tl.float32)
        t_log_sum = 0.0
        z_centre, z_log_sum = row_max, log_sum
    else:
        present_E = t_E != float("-inf")
        t_centre, t_log_sum = _centred_log_sum(t_E, present_E, OBJECTIVE.target_logits_scale)
        z_centre, z_log_sum = _centred_log_sum(z_E, present_E, OBJECTIVE.logits_scale)
    return t_centre, t_log_sum, z_centre, z_log_sum


@triton.jit
def _centred_log_sum(x_E, present_E, scale: tl.constexpr):
    """Returns the largest present entry and the log of the sum of exp(scale (x - largest)) over the present ones."""
    largest = tl.max(tl.where(present_E, x_E, float("-inf")), axis=0)
    return largest, tl.log(tl.sum(tl.where(present_E, tl.exp(scale * (x_E - largest)), 0.0), axis=0))


@triton.jit
def _log_probs(t, z, normalisers, OBJECTIVE: tl.constexpr):
    """Returns log p and log q of the entries, `ABSENT` where the teacher's logit is -inf."""
    log_p = OBJECTIVE.target_logits_scale * (t - normalisers[0]) - normalisers[1]
    log_q = OBJECTIVE.logits_scale * (z - normalisers[2]) - normalisers[3]
    present = t != float("-inf")
    return tl.where(present, log_p, ABSENT), tl.where(present, log_q, ABSENT)


@triton.jit
def _cotangents(t_E, z_E, w_K, e, normalisers, tail, term_cts, K: tl.constexpr, OBJECTIVE: tl.constexpr):
    """Returns `common` of `_topk_ct` and the cotangents of the label's logit, of the log-sum and of the tail's log-sum.

    The last has in it what the tail's columns receive through the row's log-sum. `tail` has its maximum and log-sum.
    """
    kd_ct, sft_ct = term_cts
    common = 0.0
    label_ct = sft_ct
    log_sum_ct = sft_ct
    tail_ct = 0.0
    if OBJECTIVE.label_tail or OBJECTIVE.sampled:
        w_E, w_label = _weights(t_E, w_K, e, normalisers, K, OBJECTIVE)
        label_ct += _times(kd_ct, w_label)
        log_sum_ct += _times(kd_ct, tl.sum(w_E, axis=0) + w_label)
    else:
        log_p_E, log_q_E = _log_probs(t_E, z_E, normalisers, OBJECTIVE)
        slope_sum = tl.sum(_slope(log_p_E, log_q_E, OBJECTIVE), axis=0)
        if OBJECTIVE.ghost:
            log_q_rest = OBJECTIVE.logits_scale * (tail[0] - normalisers[2]) + tail[1] - normalisers[3]
            tail_slope = _tail_slope(log_p_E, log_q_rest, OBJECTIVE)
            log_sum_ct -= _times(kd_ct, slope_sum + tail_slope)
            tail_ct = _times(kd_ct, tail_slope) + _times(log_sum_ct, tl.exp(log_q_rest))
        else:
            common = slope_sum
    return common, -OBJECTIVE.logits_scale * label_ct, log_sum_ct, tail_ct


@triton.jit
def _topk_ct(t, z, w_K, e, normalisers, common, kd_ct, K: tl.constexpr, OBJECTIVE: tl.constexpr):
    """Returns the cotangents of the logits of entries e, apart from what they receive through log-sums."""
    if OBJECTIVE.label_tail or OBJECTIVE.sampled:
        w, _ = _weights(t, w_K, e, normalisers, K, OBJECTIVE)
        slope = -w
    else:
        log_p, log_q = _log_probs(t, z, normalisers, OBJECTIVE)
        slope = _slope(log_p, log_q, OBJECTIVE) - tl.exp(log_q) * common
    return OBJECTIVE.logits_scale * _times(kd_ct, slope)


@triton.jit
def _kd(t_E, z_E, z_label, w_K, e, normalisers, K: tl.constexpr, OBJECTIVE: tl.constexpr):
    """Returns the kd term of the row, for all but the ghost, whose row has not been summed up here."""
    log_p_E, log_q_E = _log_probs(t_E, z_E, normalisers, OBJECTIVE)
    if OBJECTIVE.label_tail:
        w_E, w_label = _weights(t_E, w_K, e, normalisers, K, OBJECTIVE)
        label_nll = normalisers[3] - OBJECTIVE.logits_scale * (z_label - normalisers[2])
        kd = _times(w_label, label_nll) - tl.sum(_times(w_E, log_q_E), axis=0)
    elif OBJECTIVE.sampled:
        w_E, _ = _weights(t_E, w_K, e, normalisers, K, OBJECTIVE)
        kd = tl.sum(_times(w_E, log_p_E - log_q_E), axis=0)
    else:
        kd = tl.sum(_share(log_p_E, log_q_E, OBJECTIVE), axis=0)
    return kd


@triton.jit
def _weights(t, w_K, e, normalisers, K: tl.constexpr, OBJECTIVE: tl.constexpr):
    """Returns the shares of the target that entries e carry and, if these are all entries, the label's share."""
    if OBJECTIVE.sampled:
        w = tl.where(t != float("-inf"), tl.load(w_K + e, mask=e < K, other=0.0).to(tl.float32), 0.0)
        w_label = 0.0
    else:
        w = tl.exp(t - normalisers[0])
        w_label = tl.maximum(1 - tl.sum(w, axis=0), 0.0)
    return w, w_label


@triton.jit
def _tail_slope(log_p_E, log_q_rest, OBJECTIVE: tl.constexpr):
    """Returns d of the tail's bucket, 0 where the student has no tail."""
    log_p_rest = tl.where(log_q_rest == float("-inf"), ABSENT, _log_rest(log_p_E))
    log_q_rest = tl.where(log_q_rest == float("-inf"), ABSENT, log_q_rest)
    return _slope(log_p_rest, log_q_rest, OBJECTIVE)


@triton.jit
def _share(log_p, log_q, OBJECTIVE: tl.constexpr):
    if OBJECTIVE.kd_loss == "fwd_kl":
        share = _times_exp(log_p, log_p - log_q)
    elif OBJECTIVE.kd_loss == "bwd_kl":
        share = _times_exp(log_q, log_q - log_p)
    else:
        log_m = _log_mixture(log_p, log_q, OBJECTIVE)
        share = OBJECTIVE.jsd_beta * _times_exp(log_p, log_p - log_m)
        share += (1 - OBJECTIVE.jsd_beta) * _times_exp(log_q, log_q - log_m)
    return share


@triton.jit
def _slope(log_p, log_q, OBJECTIVE: tl.constexpr):
    if OBJECTIVE.kd_loss == "fwd_kl":
        slope = -tl.exp(log_p)
    elif OBJECTIVE.kd_loss == "bwd_kl":
        slope = _times_exp(log_q, log_q - log_p + 1)
    else:
        slope = (1 - OBJECTIVE.jsd_beta) * _times_exp(log_q, log_q - _log_mixture(log_p, log_q, OBJECTIVE))
    return slope


@triton.jit
def _log_mixture(log_p, log_q, OBJECTIVE: tl.constexpr):
    a = tl.log(tl.full((), OBJECTIVE.jsd_beta, tl.float32)) + log_p
    c = tl.log(tl.full((), 1 - OBJECTIVE.jsd_beta, tl.float32)) + log_q
    largest = tl.maximum(a, c)
    return largest + tl.log(tl.exp(a - largest) + tl.exp(c - largest))


@triton.jit
def _times_exp(log_x, y):
    return _times(tl.exp(log_x), y)


@triton.jit
def _times(x, y):
    return tl.where(x == 0, 0.0, x * y)


@triton.jit
def _log_rest(log_prob_E):
    """Returns log(1 - the mass of these), which is clamped (`reference.MAX_LOG_MASS`)."""
    largest = tl.max(log_prob_E, axis=0)
    log_mass = largest + tl.log(tl.sum(tl.exp(log_prob_E - largest), axis=0))
    return _log1mexp(tl.minimum(log_mass, MAX_LOG_MASS))


@triton.jit
def _log1mexp(log_x):
    """Returns log(1 - exp(log_x)) for log_x < 0, without expm1 and log1p, which Triton's interpreter lacks."""
    # Where exp(log_x) is near 1: 1 - exp(-y) = y - y^2/2! + y^3/3! - ..., cut at y^11: 1e-9 of it for y < log 2.
    y = tl.minimum(-log_x, 0.6931472)
    series = 1 - y * (1 / 11)
    for i in tl.static_range(9):
        series = 1 - y * (1 / (10 - i)) * series
    # Where it is near 0: the log of u, which is 1 - x rounded, plus the first order of what rounding took.
    x = tl.exp(log_x)
    u = 1 - x
    return tl.where(log_x > -0.6931472, tl.log(y * series), tl.log(u) - ((u - 1) + x) / u)
