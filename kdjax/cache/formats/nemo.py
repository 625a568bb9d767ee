"""NeMo-Aligner's records: JSON lines with `topk_logits`, plain or compressed. The format that training reads too."""

from collections.abc import Sequence
from pathlib import Path

from kdjax.cache.formats.foreign import Opened, Options
from kdjax.cache.formats.json_lines import first_object
from kdjax.data.files.paths import Source
from kdjax.data.files.scratch import open_scratch
from kdjax.data.manifest import Manifest, read_manifest
from kdjax.data.store import RecordFile
from kdjax.types import UserError


def detect(path: Path, options: Options) -> bool:
    """Returns whether the first line has NeMo-Aligner's fields."""
    first = first_object(path, options.scratch_dir)
    return first is not None and ("topk_logits" in first or "tokens" in first)


def open_sources(sources: Sequence[Source], options: Options) -> Opened:
    """Opens the files. The manifest.json beside them, if there is one, tells what they hold."""
    directories = dict.fromkeys(source.path.parent for source in sources)
    manifests = [found for each in directories if (found := read_manifest(each))]
    known = manifests[0] if manifests else Manifest(Path())
    if options.vocab_size is not None and options.vocab_size < (known.vocab_size or 0):
        raise UserError(
            f"--vocab-size {options.vocab_size}: {known.path} says that the teacher's vocabulary has "
            f"{known.vocab_size} ids; leave --vocab-size out, or correct that file"
        )
    scratch = open_scratch(options.scratch_dir)
    files = [RecordFile(source, scratch, allow_truncated=False) for source in sources]
    return Opened(
        files,
        Manifest(
            known.path,
            teacher=known.teacher,
            license=known.license,
            kind=options.kind or known.kind or "logits",
            teacher_temperature=options.teacher_temperature or known.teacher_temperature,
            vocab_size=options.vocab_size or known.vocab_size,
            tokenizer_sha256=known.tokenizer_sha256,
        ),
        manifests=manifests,
    )
