"""The bundled records in data/smollm2_topk, opened as a new user opens them."""

from pathlib import Path

import numpy as np
import pytest

from kdjax.config import DataConfig
from kdjax.data import eval_batches, open_dataset
from kdjax.types import UserError

HERE = Path(__file__).parents[2] / "data" / "smollm2_topk"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return str(tmp_path_factory.mktemp("scratch"))


def opened(name: str, scratch: str, **knobs):
    data = DataConfig(**({"sequence_length": 128, "scratch_dir": scratch, "verify_records": -1} | knobs))
    path = str(HERE / f"{name}_with_logits_CHUNK_ID.jsonl.gz")
    return open_dataset((path,), data, vocab_size=49152, need_log_sum_exp=True)


# The fingerprints are stored in checkpoints: a change would make the runs of earlier versions refuse to resume.
@pytest.mark.parametrize(
    ("name", "records", "mass", "fingerprint"),
    [
        ("train", 400, "72.4%", "1c576a7342d6688acb02954a4183ef45"),
        ("val", 64, "72.6%", "7a0a525911b2e95411f57e7ebd724304"),
    ],
)
def test_they_open_without_a_warning(scratch, name, records, mass, fingerprint):
    dataset = opened(name, scratch, strict=True)
    assert dataset.warnings == ()
    assert (len(dataset), dataset.top_k, dataset.has_log_sum_exp) == (records, 16, True)
    assert dataset.fingerprint == fingerprint
    printed = "\n".join(dataset.summary())
    for part in ("SmolLM2-135M-Instruct, licence Apache-2.0", "100.0% of their", f"the top 16 tokens hold {mass}"):
        assert part in printed


def test_the_teachers_entropy_is_bounded_by_its_top_16(scratch):
    """sum over the top 16 of -p log p, at most the teacher's entropy of 3.544 nats per token."""
    dataset = opened("val", scratch)
    found = list(eval_batches(dataset, dataset.data, global_size=30, max_batches=None, rows=slice(None)))
    live = np.concatenate([batch.loss_mask for batch in found]) > 0
    logits = np.concatenate([batch.topk_logits - batch.log_sum_exp_logits[..., None] for batch in found])[live]
    assert live.sum() == 64 * 128
    np.testing.assert_allclose(np.exp(logits).sum(axis=-1).mean(), 0.726, atol=5e-4)
    assert 1.0 < -(np.exp(logits) * logits).sum(axis=-1).mean() < 3.544


def test_their_manifest_is_compared_with_the_configuration(scratch):
    with pytest.raises(UserError, match=r"manifest.json: top_k is 16, data.top_k is 32"):
        opened("val", scratch, top_k=32)
    with pytest.raises(UserError, match=r"manifest.json: kind is 'logits', data.kind is 'probs'"):
        opened("val", scratch, kind="probs")
