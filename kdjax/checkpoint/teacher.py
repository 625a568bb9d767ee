"""A teacher on the mesh: the model of `teacher.checkpoint`, its agreement with the student, and its place."""

import dataclasses

from jax.sharding import Mesh

from kdjax.checkpoint.model_directory import load_params, read_model_config
from kdjax.config import Config
from kdjax.config.validate import resolve_model, validate_model, validate_split
from kdjax.model import Params
from kdjax.training.layout import Layout
from kdjax.types import UserError


def read_teacher(config: Config) -> Config | None:
    """Returns the teacher's model as a configuration with the run's rows and mesh; None without a teacher.

    The teacher computes and is held in `teacher.dtype`. It gets the student's rows of vocabulary padding, so that a
    shard of the vocabulary holds the same token ids of both, and one run of layers for each pipeline stage.

    Raises UserError unless it knows the student's token ids.
    """
    path = config.teacher.checkpoint
    if path is None:
        return None
    found, student = read_model_config(path, "teacher.checkpoint"), config.model
    if found.vocab_size != student.vocab_size:
        raise UserError(
            f"teacher.checkpoint = {path!r} has a vocabulary of {found.vocab_size} ids and the student one of "
            f"{student.vocab_size}; they are compared id by id, so use a teacher with the student's tokenizer, or set "
            f"model.vocab_size={found.vocab_size} if the student starts from nothing"
        )
    digests = found.tokenizer_sha256, student.tokenizer_sha256
    if None not in digests and digests[0] != digests[1]:
        raise UserError(
            f"teacher.checkpoint = {path!r} has the tokenizer {digests[0]} and model.tokenizer_sha256 is {digests[1]}: "
            "the same ids mean different tokens; use a teacher with the student's tokenizer, or compare cached entries "
            "by rank with loss.cross_tokenizer=rank_match"
        )
    length = config.data.sequence_length
    if found.position == "learned" and found.max_positions is not None and found.max_positions < length:
        raise UserError(
            f"data.sequence_length = {length}: teacher.checkpoint = {path!r} has {found.max_positions} learned "
            "positions; use at most as many"
        )
    model = dataclasses.replace(
        found,
        padded_vocab_size=student.vocab_rows,
        dtype=config.teacher.dtype,
        param_dtype=config.teacher.dtype,
        remat="none",  # it has no backward pass
        attention="xla" if student.attention == "xla" else None,
    )
    model = resolve_model(model, length)
    validate_model(model)
    mesh = dataclasses.replace(config.mesh, interleave=1)
    return Config(model=model, data=config.data, batch=config.batch, mesh=mesh)


def lay_out(config: Config, teacher: Config | None, mesh: Mesh) -> Layout:
    """Returns how a run lies on the mesh, with its teacher beside it.

    Raises UserError if the teacher cannot be split over the mesh.
    """
    if teacher is None:
        return Layout(config, mesh)
    try:
        validate_split(teacher, mesh.shape)
    except UserError as error:
        raise UserError(
            f"teacher.checkpoint = {config.teacher.checkpoint!r} cannot be split over this mesh. In terms of the "
            f"teacher's model, {error}"
        ) from error
    return Layout(config, mesh, Layout(teacher, mesh))


def load_teacher(layout: Layout) -> Params | None:
    """Returns the parameters of `layout.teacher`, each process's shards on its devices; None without a teacher."""
    path = layout.config.teacher.checkpoint
    if path is None or layout.teacher is None:
        return None
    return load_params(path, layout.teacher.config.model, layout.teacher.params)
