"""Megatron-LM's cached log-probabilities: tar files of zstd-compressed torch files, a member for each iteration.

(megatron/training/distillation/logits_saver.py and utils.py.) A file is dpD__I.tar, before that cp0_dpD__I.tar, of
data-parallel rank D. Its members are _meta.json and ITERATION.pt.zst, later FIRST-END.pt.zst (numbers of samples), with

    values        log-probabilities [S, samples, k], float16, bfloat16 or float32; -1000 or less: no entry (top-p)
    indices_low   the lower 16 bits of the ids, uint16
    bit_17        the 17th bit, bool

in version 1 a list of such tensors, one a microbatch, in version 2 one tensor. The samples of an iteration are dealt to
the ranks a microbatch at a time.

There are no tokens: Megatron reads its data set again, in the same order. The user gives them as an array [N, S + 1] of
the samples in that order (--tokens FILE.npy), whose row g is sample g.
"""

import io
import json
import re
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from kdjax.cache.formats.foreign import Opened, Options, digest_of, make_index, refuse_kind, scaled_to_one
from kdjax.convert.checkpoint_files import ByteRange
from kdjax.convert.pytorch import torch_file
from kdjax.convert.tensors import LazyTensor
from kdjax.data.checks import MASS_TOLERANCE
from kdjax.data.errors import explain_os_errors
from kdjax.data.files.paths import Source
from kdjax.data.files.scratch import open_scratch
from kdjax.data.manifest import Manifest
from kdjax.data.records import Record, RecordError, prefix_errors
from kdjax.types import UserError

META = "_meta.json"
NAME = re.compile(r"(?:cp(?P<cp>\d+)_)?dp(?P<dp>\d+)__(?:\d+-)?\d+\.tar")
MEMBER = re.compile(r"(?P<first>\d+)(?:-(?P<end>\d+))?\.pt\.zst")
NO_ENTRY = -1e3  # CACHED_LOGITS_LOGPROB_SENTINEL; the saver writes -1e4 too
LARGEST_MEMBER = 2**34  # bytes when decompressed


def detect(path: Path, options: Options) -> bool:
    """Returns whether the file is a tar file."""
    with explain_os_errors(path, "read this file"):
        return tarfile.is_tarfile(path) if path.suffix == ".tar" else False


class _Member(NamedTuple):
    """Where one iteration of one data-parallel rank is."""

    path: Path
    offset: int
    size: int
    rank: int
    first: int  # iteration, or the number of its first sample
    counts_samples: bool  # `first` is a number of samples


def open_sources(sources: Sequence[Source], options: Options) -> Opened:
    """Opens the files. Raises UserError without --tokens, and for what Megatron itself does not read any more."""
    refuse_kind(options, "Megatron-LM", "log_probs")
    if options.tokens is None:
        raise UserError(
            f"{sources[0].path}: holds log-probabilities and no tokens: Megatron-LM takes them from its data set, in "
            "the order of training; write them as an array [samples, sequence length + 1] and give --tokens FILE.npy"
        )
    facts = Manifest(
        Path(), kind="log_probs", teacher_temperature=options.teacher_temperature, vocab_size=options.vocab_size
    )
    return Opened([_Files(sources, options.tokens, options.scratch_dir)], facts)


class _Files:
    """All files of a run, as one list of samples in the order of training."""

    is_cut = False

    def __init__(self, sources: Sequence[Source], tokens: Path, scratch_dir: str | None):
        self.source = sources[0]
        self._scratch = open_scratch(scratch_dir)
        self._tokens_path, self._tokens = tokens, _open_tokens(tokens)
        members, settings = [], list[dict[str, Any]]()
        for source in sources:
            found, meta = _list_members(source.path)
            members += found
            settings.append(meta)
        self._settings = settings[0]
        if any(meta != self._settings for meta in settings):
            raise UserError(f"{sources[0].path}: the files have different {META}: they belong to different runs")
        if not members:
            raise UserError(f"{sources[0].path}: holds no iteration; name files that the teacher's run wrote")
        self._members = {(member.first, member.rank): member for member in members}
        self._ranks = 1 + max(member.rank for member in members)
        self._firsts = sorted({member.first for member in members})
        missing = [(i, d) for i in self._firsts for d in range(self._ranks) if (i, d) not in self._members]
        if missing or len(self._members) != len(members):
            raise UserError(
                f"{sources[0].path}: "
                + (f"rank {missing[0][1]} lacks {missing[0][0]}" if missing else "an iteration is there twice")
                + "; name the files of all data-parallel ranks, each once"
            )
        self._held: tuple[_Member, list[tuple[np.ndarray, np.ndarray]]] | None = None
        first = [self._microbatches(self._members[self._firsts[0], rank]) for rank in range(self._ranks)]
        saver = self._settings.get("saver", {})
        self._microbatch = int(saver.get("mbs_save") or first[0][0][0].shape[1])
        self._batch = sum(values.shape[1] for each in first for values, _ in each)  # samples of an iteration
        if self._batch % (self._microbatch * self._ranks):
            raise UserError(
                f"{sources[0].path}: {self._batch} samples an iteration cannot be dealt to {self._ranks} ranks in "
                f"microbatches of {self._microbatch}; name the files of all ranks"
            )
        self._top_k = max([int(saver.get("k") or 0), *(values.shape[2] for each in first for values, _ in each)])
        self._samples = np.concatenate([self._first_sample(first) + np.arange(self._batch) for first in self._firsts])
        if self._samples.max() >= len(self._tokens):
            raise UserError(
                f"{tokens}: holds {len(self._tokens)} samples, and the log-probabilities reach sample "
                f"{self._samples.max()}; write the tokens of the whole run"
            )
        digest = "".join(digest_of(source.path) for source in sources)
        lengths = np.full(len(self._samples), self._tokens.shape[1] - 1)
        self.index = make_index(lengths, digest + digest_of(tokens))

    def record(self, number: int) -> Record:
        """Returns sample `number` of those stored. Raises RecordError if it cannot be used."""
        place, within = divmod(int(number), self._batch)
        turn, offset = divmod(within, self._microbatch)
        turn, rank = divmod(turn, self._ranks)
        row = turn * self._microbatch + offset  # of the rank's samples in this iteration
        with prefix_errors(self.where(number)):
            values, ids = self._row(self._members[self._firsts[place], rank], row)
            tokens = self._tokens[self._samples[number]]
            if len(values) != len(tokens) - 1:
                raise RecordError(
                    f"{len(values)} positions, and {self._tokens_path} has {len(tokens)} tokens a sample; it must have "
                    "one more than there are positions"
                )
            if tokens.min() < -(2**31) or tokens.max() >= 2**31:
                raise RecordError(f"{self._tokens_path}: holds ids that are not 32-bit integers")
            tokens = tokens.astype(np.int32)
            values = scaled_to_one(np.where(values <= NO_ENTRY, -np.inf, values), 1 + MASS_TOLERANCE)
            record = Record(tokens[:-1], tokens[1:], np.ones(len(values), np.float32), values, ids.astype(np.int32))
        return record.padded(max(self._top_k, record.top_k))

    def where(self, number: int) -> str:
        """Returns the sample, and the file of its iteration, for messages."""
        place, within = divmod(int(number), self._batch)
        member = self._members[self._firsts[place], within // self._microbatch % self._ranks]
        return f"{member.path}, sample {self._samples[number]}"

    def label_log_probs(self, number: int) -> None:
        """Returns None: the files do not have them."""

    def _first_sample(self, first: int) -> int:
        counts_samples = self._members[first, 0].counts_samples
        return first if counts_samples else first * self._batch

    def _row(self, member: _Member, row: int) -> tuple[np.ndarray, np.ndarray]:
        for values, ids in self._microbatches(member):
            if row < values.shape[1]:
                return values[:, row], ids[:, row]
            row -= values.shape[1]
        raise RecordError("its iteration has fewer samples than the first one; name the files of one run")

    def _microbatches(self, member: _Member) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns values and ids [S, samples, k] of an iteration, of which the last read is kept."""
        if self._held is None or self._held[0] != member:
            self._held = member, _read_member(member, self._scratch)
        return self._held[1]


def _open_tokens(path: Path) -> np.ndarray:
    with explain_os_errors(path, "read these tokens"):
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{path}: cannot be read as a .npy file ({error}); write it with numpy.save") from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype.kind not in "iu" or tokens.shape[1] < 2:
        raise UserError(f"{path}: must hold an integer array [samples, sequence length + 1]")
    return tokens


def _list_members(path: Path) -> tuple[list[_Member], dict[str, Any]]:
    """Returns the iterations of a file, unread, and its metadata."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: its name is not dpRANK__ITERATION.tar, which tells whose samples it holds")
    if int(match["cp"] or 0):
        raise UserError(
            f"{path}: holds a slice of each sequence, of context-parallel rank {match['cp']}, which Megatron-LM does "
            "not read any more either; write the cache again without context parallelism"
        )
    members, meta = [], dict[str, Any]()
    try:
        with explain_os_errors(path, "read this file"), tarfile.open(path, "r:") as archive:
            for entry in archive:
                if entry.name == META:
                    content = archive.extractfile(entry)
                    if content is None:
                        raise tarfile.TarError(f"{META} is not a file")
                    meta = json.load(content)
                elif found := MEMBER.fullmatch(entry.name):
                    counts = found["end"] is not None
                    members.append(
                        _Member(path, entry.offset_data, entry.size, int(match["dp"]), int(found["first"]), counts)
                    )
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a tar file ({error}); copy it again") from error
    version = (
        meta.get("saver", {}).get("format_version", meta.get("format_version", 1)) if isinstance(meta, dict) else 9
    )
    if version not in (1, 2):
        raise UserError(f"{path}: format version {version}; versions 1 and 2 are read")
    end = max((member.offset + member.size for member in members), default=0)
    if end > path.stat().st_size:
        raise UserError(f"{path}: ends in the middle of an iteration; copy it again")
    return members, meta


def _read_member(member: _Member, scratch: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    label = f"{member.path}, {member.first}"
    with explain_os_errors(member.path, "read this file"), member.path.open("rb") as file:
        file.seek(member.offset)
        compressed = file.read(member.size)
    with tempfile.NamedTemporaryFile(dir=scratch) as plain:
        try:
            for part in zstandard.ZstdDecompressor().read_to_iter(io.BytesIO(compressed)):
                plain.write(part)
                if plain.tell() > LARGEST_MEMBER:
                    raise UserError(f"{label}: more than {LARGEST_MEMBER} bytes when decompressed; it is damaged")
        except zstandard.ZstdError as error:
            raise RecordError(f"{label}: damaged ({error}); copy the file again") from error
        plain.flush()
        content = torch_file.load(ByteRange(Path(plain.name), 0, plain.tell(), label))
        try:
            values, low, high = (_tensors(content[name]) for name in ("values", "indices_low", "bit_17"))
            parts = list(zip(values, low, high, strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{label}: has no values, indices_low and bit_17 alike; copy the file again") from error
        return [_decode(*part, label) for part in parts]


def _tensors(value: Any) -> list[np.ndarray]:
    """Returns one tensor, or those of a list."""
    parts = [value] if isinstance(value, LazyTensor) else list(value)
    if not all(isinstance(part, LazyTensor) for part in parts):
        raise TypeError
    return [part.read() for part in parts]


def _decode(values: np.ndarray, low: np.ndarray, high: np.ndarray, label: str) -> tuple[np.ndarray, np.ndarray]:
    if values.ndim != 3 or low.shape != values.shape:
        raise RecordError(f"{label}: values {values.shape} and ids {low.shape} must be [S, samples, k] alike")
    if high.shape != low.shape:
        # A missing entry has id -1, so that its 17th bit is set. If no other is, all others are 0.
        if np.unpackbits(high.view(np.uint8)).sum() != np.count_nonzero(values.astype(np.float32) <= NO_ENTRY):
            raise UserError(
                f"{label}: the 17th bits of the ids are packed eight to a byte, in an order that is not known here; "
                "only files whose ids are all below 65536 can be read so: save with a version that stores them as bool"
            )
        high = np.zeros(low.shape, bool)
    return values.astype(np.float32), low.astype(np.int64) & 0xFFFF | high.astype(np.int64) << 16
