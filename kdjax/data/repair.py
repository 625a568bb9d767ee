"""Repairs what can be repaired in the teacher's entries: puts rows in descending order and merges duplicate ids."""

import numpy as np

from kdjax.data.records import RecordError


def sort_entries(logits_SxK: np.ndarray, ids_SxK: np.ndarray, strict: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns logits and ids with each row in descending order, -inf last, and the number of rows that were not.

    Raises RecordError for the first such row if `strict`.
    """
    rising_S = (logits_SxK[:, 1:] > logits_SxK[:, :-1]).any(axis=1)
    count = int(rising_S.sum())
    if count and strict:
        t = int(np.argmax(rising_S))
        k = int(np.argmax(logits_SxK[t, 1:] > logits_SxK[t, :-1]))
        raise RecordError(
            f"topk_logits[{t}] is not in descending order (entry {k} is {logits_SxK[t, k]:g}, entry {k + 1} is "
            f"{logits_SxK[t, k + 1]:g}), and data.strict is set; sort the row and its ids, or unset data.strict"
        )
    if count:
        logits_SxK, ids_SxK = logits_SxK.copy(), ids_SxK.copy()
        order = np.argsort(-logits_SxK[rising_S], axis=1, kind="stable")
        logits_SxK[rising_S] = np.take_along_axis(logits_SxK[rising_S], order, axis=1)
        ids_SxK[rising_S] = np.take_along_axis(ids_SxK[rising_S], order, axis=1)
    return logits_SxK, ids_SxK, count


def merge_duplicates(
    logits_SxK: np.ndarray, ids_SxK: np.ndarray, unmasked_S: np.ndarray, strict: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns logits and ids with each id once per unmasked row, and the number of rows that had one more than once.

    The logits of one id are replaced by their logsumexp. A merged row is in descending order, padded with (-inf, id 0).
    Raises RecordError for the first such row if `strict`.
    """
    absent_ids_K = -1 - np.arange(ids_SxK.shape[1])  # one for each absent entry, different from one another and any id
    sorted_ids_SxK = np.sort(np.where(logits_SxK > -np.inf, ids_SxK, absent_ids_K), axis=1)
    same_SxK = unmasked_S[:, None] & (sorted_ids_SxK[:, 1:] == sorted_ids_SxK[:, :-1])
    rows = np.flatnonzero(same_SxK.any(axis=1))
    if len(rows) and strict:
        t = int(rows[0])
        duplicate = sorted_ids_SxK[t, 1:][same_SxK[t]][0]
        raise RecordError(
            f"topk_token_ids[{t}] has id {duplicate} more than once, and data.strict is set; store each id once, or "
            "unset data.strict to have the probabilities of equal ids added"
        )
    if len(rows):
        logits_SxK, ids_SxK = logits_SxK.copy(), ids_SxK.copy()
    for row in rows:
        present_K = logits_SxK[row] > -np.inf
        ids, group = np.unique(ids_SxK[row, present_K], return_inverse=True)
        merged = np.full(len(ids), -np.inf, np.float32)
        np.logaddexp.at(merged, group, logits_SxK[row, present_K])
        order = np.argsort(-merged, kind="stable")
        logits_SxK[row], ids_SxK[row] = -np.inf, 0
        logits_SxK[row, : len(ids)], ids_SxK[row, : len(ids)] = merged[order], ids[order]
    return logits_SxK, ids_SxK, len(rows)
