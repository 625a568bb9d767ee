"""Rows of teacher entries put right: in descending order, every id once."""

import numpy as np

from kdjax.data.records import RecordError


def sort_entries(logits_SxK: np.ndarray, ids_SxK: np.ndarray, strict: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows in descending order, absent entries last, ids with them; and how many were not.

    Raises RecordError for the first that is not if `strict`.
    """
    rising_S = (logits_SxK[:, 1:] > logits_SxK[:, :-1]).any(axis=1)
    count = int(rising_S.sum())
    if count and strict:
        t = int(np.argmax(rising_S))
        k = int(np.argmax(logits_SxK[t, 1:] > logits_SxK[t, :-1]))
        raise RecordError(
            f"topk_logits[{t}] is not in descending order (entry {k} is {logits_SxK[t, k]:g}, entry "
            f"{k + 1} is {logits_SxK[t, k + 1]:g}), and data.strict is set; sort it with its ids, or "
            "unset data.strict"
        )
    if count:
        logits_SxK, ids_SxK = logits_SxK.copy(), ids_SxK.copy()
        order = np.argsort(-logits_SxK[rising_S], axis=1, kind="stable")
        logits_SxK[rising_S] = np.take_along_axis(logits_SxK[rising_S], order, axis=1)
        ids_SxK[rising_S] = np.take_along_axis(ids_SxK[rising_S], order, axis=1)
    return logits_SxK, ids_SxK, count


def merge_repeats(
    logits_SxK: np.ndarray, ids_SxK: np.ndarray, live_S: np.ndarray, strict: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows without an id twice: its logits become their logsumexp; and how many unmasked rows had one.

    A merged row is in descending order and filled up with absent entries. Raises RecordError for the first if
    `strict`.
    """
    stand_in_K = -1 - np.arange(ids_SxK.shape[1])  # for absent entries: equal to no id and to none of each other
    sorted_ids_SxK = np.sort(np.where(logits_SxK > -np.inf, ids_SxK, stand_in_K), axis=1)
    same_SxK = live_S[:, None] & (sorted_ids_SxK[:, 1:] == sorted_ids_SxK[:, :-1])
    repeats_S = np.flatnonzero(same_SxK.any(axis=1))
    if len(repeats_S) and strict:
        t = int(repeats_S[0])
        repeated_id = sorted_ids_SxK[t, 1:][same_SxK[t]][0]
        raise RecordError(
            f"topk_token_ids[{t}] holds id {repeated_id} twice, and data.strict is set; store each id "
            "once, or unset data.strict to have their probabilities added"
        )
    if len(repeats_S):
        logits_SxK, ids_SxK = logits_SxK.copy(), ids_SxK.copy()
    for row in repeats_S:
        present_K = logits_SxK[row] > -np.inf
        ids, group = np.unique(ids_SxK[row, present_K], return_inverse=True)
        merged = np.full(len(ids), -np.inf, np.float32)
        np.logaddexp.at(merged, group, logits_SxK[row, present_K])
        order = np.argsort(-merged, kind="stable")
        logits_SxK[row], ids_SxK[row] = -np.inf, 0
        logits_SxK[row, : len(ids)], ids_SxK[row, : len(ids)] = merged[order], ids[order]
    return logits_SxK, ids_SxK, len(repeats_S)
