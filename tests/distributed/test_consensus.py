"""What several processes agree on."""

import threading

import jax
import numpy as np
import pytest

from kdjax.distributed import consensus, jax_private
from kdjax.types import UserError


class FakeStore:
    """A key-value store in this process."""

    def __init__(self) -> None:
        self.pairs: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        assert key not in self.pairs, "the real store refuses to overwrite"
        self.pairs[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.pairs.items() if key.startswith(prefix)]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    store = FakeStore()
    monkeypatch.setattr(jax_private, "key_value_store", lambda: store)
    return store


def test_a_stop_is_due_on_all_processes_after_the_same_step(store: FakeStore) -> None:
    """Whichever of the two is asked to stop and whichever is ahead, by at most the one step that metrics allow."""
    for lead in (-1, 0, 1):
        store.pairs.clear()
        asked = threading.Event()
        asked.set()
        ours, theirs = consensus.SharedStop(asked), consensus.SharedStop(threading.Event())
        stopped: dict[str, int] = {}
        for moment in range(5, 12):  # `ours` is asked at its step 5
            for name, stop, step in (("theirs", theirs, moment + lead), ("ours", ours, moment)):
                if name not in stopped and stop.is_due(step):
                    stopped[name] = step
        assert stopped == {"ours": 7, "theirs": 7}, lead


def test_a_single_process_stops_at_once_and_agrees_with_itself() -> None:
    asked = threading.Event()
    stop = consensus.SharedStop(asked)
    assert not stop.is_due(3)
    asked.set()
    assert stop.is_due(3)
    assert consensus.all_agree("the checkpoint cannot be read")
    assert consensus.is_process_zero()


def test_all_agree_when_every_process_makes_the_same_statement(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not consensus.all_agree("a cannot be read", timeout_s=0)
    store.pairs.clear()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    store.key_value_set(f"{consensus.AGREED}b cannot be read/0", "")
    assert not consensus.all_agree("a cannot be read", timeout_s=0), "process 0 says it of another file"
    assert consensus.all_agree("b cannot be read", timeout_s=0)


def test_processes_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some processes of four read other records."""
    different: list[int] = []

    def gather(mine_2x16: np.ndarray) -> np.ndarray:
        digests_4x2x16 = np.stack([mine_2x16] * 4)
        digests_4x2x16[different, 1, 7] ^= 1
        return digests_4x2x16

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(consensus.multihost_utils, "process_allgather", gather)
    values = {"the configuration": "a", "the training records": "b"}
    consensus.check_same(values)
    different.append(2)
    with pytest.raises(UserError, match=r"^process 2 of 4 differs from process 0 in the training records; start all"):
        consensus.check_same(values)
    different.append(1)
    with pytest.raises(UserError, match=r"^processes 1, 2 of 4 differ from process 0 in the training records"):
        consensus.check_same(values)
