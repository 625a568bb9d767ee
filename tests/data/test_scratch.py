"""The scratch directory, shared by processes and runs."""

import threading
import time
from pathlib import Path

from kdjax.data.files.scratch import exclusive_lock


def test_one_process_at_a_time_indexes_a_file(tmp_path: Path) -> None:
    inside, most = 0, 0

    def index() -> None:
        nonlocal inside, most
        with exclusive_lock(tmp_path, tmp_path / "records.jsonl"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1

    threads = [threading.Thread(target=index) for _ in range(4)]
    for thread in threads:
        thread.start()
    with exclusive_lock(tmp_path, tmp_path / "other.jsonl"):  # another file is no reason to wait
        for thread in threads:
            thread.join(timeout=10)
    assert most == 1
