"""MaxText's top-k logits: ArrayRecord files of tf.train.Example, as its save_top_k_teacher_logits.py writes them.

Features: inputs [S], top_k_logits [S * k] (raw logits) and top_k_indices [S * k]; by default also targets,
inputs_segmentation, targets_segmentation and inputs_position, all [S]. There is no logsumexp, so the probability
outside the top k is unknown. A row with several segments is several records: the teacher saw each by itself.

Older versions of the script wrote pickles of whole batches, which are refused.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from kdjax.cache.formats.foreign import Opened, Options, digest_of, make_index, refuse_kind
from kdjax.cache.formats.tf_example import NotAnExampleError, parse_example
from kdjax.cli import Progress
from kdjax.data.errors import explain_os_errors
from kdjax.data.files.index import UNREADABLE
from kdjax.data.files.paths import Source
from kdjax.data.manifest import Manifest
from kdjax.data.records import Record, RecordError, prefix_errors
from kdjax.types import UserError

SUFFIXES = (".array_record", ".arrayrecord")
REQUIRED = ("inputs", "top_k_logits", "top_k_indices")
PICKLE = b"\x80"  # how every pickle starts; an Example starts with 0x0a


def detect(path: Path, options: Options) -> bool:
    """Returns whether the file's name is that of an ArrayRecord file."""
    return path.name.endswith(SUFFIXES)


def open_sources(sources: Sequence[Source], options: Options) -> Opened:
    """Opens the files. Raises UserError for one that is no ArrayRecord file of Examples."""
    refuse_kind(options, "MaxText", "logits")
    files = [_File(source) for source in sources]
    facts = Manifest(
        Path(), kind="logits", teacher_temperature=options.teacher_temperature, vocab_size=options.vocab_size
    )
    return Opened(files, facts)


class _File:
    """An open ArrayRecord file, and the segments in its rows."""

    is_cut = False

    def __init__(self, source: Source):
        self.source = source
        with explain_os_errors(source.path, "read this record file"), source.path.open("rb"):
            pass
        try:
            self._reader = array_record_module.ArrayRecordReader(str(source.path), "readahead_buffer_size:0")
            count = self._reader.num_records()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{source.path}: cannot be read as an ArrayRecord file; it is damaged or was cut off: copy it again"
            ) from error
        places: list[tuple[int, int, int]] = []  # row, first position, one past the last
        lengths: list[int] = []
        with Progress(f"indexing {source.path.name}", count, "row", delay_s=2.0) as progress:
            for row in range(count):
                progress.add(1)
                try:
                    found = _segments(self._features(row))
                except RecordError:
                    places, lengths = [*places, (row, 0, 0)], [*lengths, UNREADABLE]
                    continue
                places += [(row, start, stop) for start, stop in found]
                lengths += [stop - start for start, stop in found]
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self.index = make_index(lengths, digest_of(source.path), (self._places[:, 0] + 1).tolist())

    def record(self, number: int) -> Record:
        """Returns record `number` (from 0). Raises RecordError if it cannot be used."""
        row, start, stop = (int(place) for place in self._places[number])
        with prefix_errors(self.where(number)):
            record = _record(self._features(row))
        part = slice(start, stop)
        return Record(
            record.tokens[part],
            record.labels[part],
            record.loss_mask[part],
            record.topk_logits[part],
            record.topk_token_ids[part],
        )

    def where(self, number: int) -> str:
        """Returns the file, the row, and the segment's place in it, for messages."""
        row, start, _ = self._places[number]
        return f"{self.source.path}, row {row + 1}" + (f", from position {start}" if start else "")

    def _features(self, row: int) -> dict[str, np.ndarray]:
        try:
            data = self._reader.read([row])[0]
        except (RuntimeError, IndexError, ValueError) as error:
            raise RecordError("damaged; copy the file again") from error
        if data.startswith(PICKLE):
            raise UserError(
                f"{self.source.path}: holds pickles of whole batches, which older versions of MaxText wrote; pickles "
                "run code, so they are not read: write the logits again with a newer save_top_k_teacher_logits.py"
            )
        try:
            return parse_example(data)
        except NotAnExampleError as error:
            raise RecordError(f"not a tf.train.Example ({error}); copy the file again") from error


def _record(features: dict[str, np.ndarray]) -> Record:
    """Returns the whole row as one record."""
    missing = [name for name in REQUIRED if name not in features]
    if missing:
        raise RecordError(f"no feature {', '.join(missing)}; a row needs {', '.join(REQUIRED)}")
    tokens = _int32(features["inputs"], "inputs")
    length, logits, ids = len(tokens), features["top_k_logits"], features["top_k_indices"]
    if not length or logits.shape != ids.shape or not len(ids) or len(ids) % length:
        raise RecordError(
            f"inputs has {length} tokens, top_k_logits {len(logits)} values and top_k_indices {len(ids)}; they must be "
            "k values and ids for each token: write this row again"
        )
    for name in ("targets", "inputs_segmentation", "targets_segmentation"):
        if name in features and len(features[name]) != length:
            raise RecordError(f"{name} has {len(features[name])} positions, inputs has {length}; write this row again")
    segments_S = features.get("inputs_segmentation", np.ones(length, np.int64))
    if "targets" in features:
        labels = _int32(features["targets"], "targets")
        learned_S = features.get("targets_segmentation", segments_S) != 0
    else:  # the next token of the same segment
        labels = np.append(tokens[1:], np.int32(0))
        learned_S = np.append(segments_S[1:] == segments_S[:-1], False) & (segments_S != 0)
    return Record(
        tokens,
        labels,
        learned_S.astype(np.float32),
        logits.reshape(length, -1).astype(np.float32),
        _int32(ids, "top_k_indices").reshape(length, -1),
    )


def _segments(features: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """Returns the positions of each segment; 0 is padding. A row of nothing but padding holds none."""
    length = len(_record(features))
    ids = features.get("inputs_segmentation", np.ones(length, np.int64))
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), length]
    return [(start, stop) for start, stop in itertools.pairwise(edges) if ids[start] != 0]


def _int32(ids: np.ndarray, name: str) -> np.ndarray:
    if ids.dtype != np.int64 or (len(ids) and not -(2**31) <= ids.min() <= ids.max() < 2**31):
        raise RecordError(f"{name} must hold 32-bit integers; write this row again")
    return ids.astype(np.int32)
