"""The compressed log-probabilities of arcee-ai/DistillKit, in NumPy (its distillkit/compression/ is the specification).

A position has k entries, largest first. Their bytes, one part after the other:

    the first `exact_k` values in `exact_dtype`;
    the coefficients of `polynomial_terms` in `term_dtype`, fitted to the other values at t = 0, 1, ... (with
    `normalize_t` at t from 0 to 1);
    for each of `residual_bins` a scale and `num_elements` integers of `element_bits`, which times the scale are added
    to the next values.

With `delta_encoding` every value but the first is the difference from the one before. The ids have ceil(log2 d) bits
each. Numbers of any width are packed most significant bit first, and the last byte is filled with zeros.
"""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import yaml
from jaxtyping import Float, Int, UInt

from kdjax.data.errors import explain_os_errors
from kdjax.types import UserError

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float16", "bfloat16", "float32", "float64")}
FUNCTIONS = {"sqrt": np.sqrt, "exp": np.exp}
LEAST_SINGULAR = 1e-5  # smaller singular values of the fit count as 0, as in DistillKit


@dataclasses.dataclass(frozen=True)
class Bin:
    """Integers of equal width with a common scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
    """How entries are stored: DistillKit's DistributionQuantizationConfig, with its defaults."""

    d: int  # the vocabulary
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False  # changes how values are rounded, not how they are read
    normalize_t: bool = False

    @property
    def id_bits(self) -> int:
        """Bits of a token id."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def value_bytes(self) -> int:
        """Bytes of a position's values."""
        sizes = [self.exact_k * DTYPES[self.exact_dtype].itemsize]
        sizes.append(len(self.polynomial_terms) * DTYPES[self.term_dtype].itemsize)
        sizes += (
            DTYPES[each.scale_dtype].itemsize + -(-each.element_bits * each.num_elements // 8)
            for each in self.residual_bins
        )
        return sum(sizes)

    @property
    def id_bytes(self) -> int:
        """Bytes of a position's ids."""
        return -(-self.k * self.id_bits // 8)

    def to_yaml(self) -> str:
        """Returns the text of a file that DistillKit reads."""
        content = dataclasses.asdict(self)
        content["polynomial_terms"] = list(self.polynomial_terms) or None
        content["residual_bins"] = list(content["residual_bins"])
        return yaml.safe_dump(content)


def read_config(path: Path) -> CompressionConfig:
    """Returns the configuration in a file: alone, or the `logprob_compressor` of a training configuration.

    Raises UserError for what is missing or cannot be.
    """
    with explain_os_errors(path, "read this compression config"):
        text = path.read_text()
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({error})") from error
    for key in ("teacher", "logprob_compressor"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    if not isinstance(content, dict) or any(content.get(key) is None for key in ("d", "k", "exact_k")):
        raise UserError(f"{path}: has no d, k and exact_k; give DistillKit's logprob_compressor configuration")
    names = {field.name for field in dataclasses.fields(CompressionConfig)}
    try:
        known = {key: value for key, value in content.items() if key in names and value is not None}
        known["polynomial_terms"] = tuple(known.get("polynomial_terms", ()))
        known["residual_bins"] = tuple(Bin(**each) for each in known.get("residual_bins", ()))
        config = CompressionConfig(**known)
        _check(config)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: {error}; give DistillKit's logprob_compressor configuration") from error
    return config


def _check(config: CompressionConfig) -> None:
    """Raises ValueError or KeyError for a configuration that cannot be."""
    counts = [config.d, config.k, *(n for each in config.residual_bins for n in (each.element_bits, each.num_elements))]
    if any(type(count) is not int or count < 1 for count in counts) or not 0 <= config.exact_k <= config.k:
        raise ValueError(f"d = {config.d}, k = {config.k}, exact_k = {config.exact_k} cannot be")
    if sum(each.num_elements for each in config.residual_bins) > config.k - config.exact_k:
        raise ValueError("residual_bins hold more than k - exact_k elements")
    if config.exact_k < config.k and not (config.polynomial_terms or config.residual_bins):
        raise ValueError("k > exact_k needs polynomial_terms or residual_bins")
    for dtype in (config.exact_dtype, config.term_dtype, *(each.scale_dtype for each in config.residual_bins)):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    for term in config.polynomial_terms:
        if type(term) is not int and term not in FUNCTIONS:
            raise ValueError(f"the polynomial term {term!r} is neither a power nor one of {', '.join(FUNCTIONS)}")
    if any(each.element_bits > 32 for each in config.residual_bins):
        raise ValueError("element_bits above 32 are not read")


def decode_values(data: UInt[np.ndarray, "S bytes"], config: CompressionConfig) -> Float[np.ndarray, "S k"]:
    """Returns the log-probabilities, float32, computed in float64: DistillKit rounds them to `exact_dtype`."""
    at = 0

    def take(count: int, dtype: np.dtype) -> np.ndarray:
        nonlocal at
        part = np.ascontiguousarray(data[:, at : at + count * dtype.itemsize])
        at += count * dtype.itemsize
        return part.view(dtype).astype(np.float64)

    exact = take(config.exact_k, DTYPES[config.exact_dtype])
    rest = np.zeros((len(data), config.k - config.exact_k))
    if config.polynomial_terms:
        coefficients = take(len(config.polynomial_terms), DTYPES[config.term_dtype])
        rest += coefficients @ _terms(config).T
    first = 0
    for each in config.residual_bins:
        scale = take(1, DTYPES[each.scale_dtype])
        size = -(-each.element_bits * each.num_elements // 8)
        integers = unpack(data[:, at : at + size], each.element_bits, each.num_elements)
        at += size
        # Two's complement without its sign: 0 stands for the lowest. One bit stands for -1 and 1.
        low = -(2 ** (each.element_bits - 1))
        signed = 2 * integers - 1 if each.element_bits == 1 else integers + low
        rest[:, first : first + each.num_elements] += signed * scale
        first += each.num_elements
    values = np.concatenate([exact, rest], axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.cumsum(values, axis=1) if config.delta_encoding else values).astype(np.float32)


def encode_values(values: Float[np.ndarray, "S k"], config: CompressionConfig) -> UInt[np.ndarray, "S bytes"]:
    """Returns the bytes of log-probabilities in descending order. Rounds each to nearest (no error diffusion)."""
    values = values.astype(np.float64)
    if config.delta_encoding:
        values = np.diff(values, axis=1, prepend=0.0)
    parts = [_octets(values[:, : config.exact_k], config.exact_dtype)]
    rest = values[:, config.exact_k :]
    if config.polynomial_terms:
        terms = _terms(config)
        inverse = np.linalg.pinv(terms, rcond=LEAST_SINGULAR / np.linalg.norm(terms, 2))
        coefficients = (rest @ inverse.T).astype(DTYPES[config.term_dtype])
        parts.append(_octets(coefficients, config.term_dtype))
        rest = rest - coefficients.astype(np.float64) @ terms.T
    first = 0
    for each in config.residual_bins:
        some = rest[:, first : first + each.num_elements]
        first += each.num_elements
        half = 1 if each.element_bits == 1 else 2 ** (each.element_bits - 1)
        largest = np.abs(some).max(axis=1, keepdims=True)
        scale = np.where(largest == 0, 1, largest / half).astype(DTYPES[each.scale_dtype])
        scaled = some / scale.astype(np.float64)
        if each.element_bits == 1:
            integers = (scaled > 0).astype(np.int64)
        else:
            integers = np.clip(np.rint(scaled), -half, half - 1).astype(np.int64) + half
        parts += [_octets(scale, each.scale_dtype), pack(integers, each.element_bits)]
    return np.concatenate(parts, axis=1)


def _terms(config: CompressionConfig) -> Float[np.ndarray, "n terms"]:
    """Returns the terms at each of the entries that are not exact."""
    count = config.k - config.exact_k
    t = np.linspace(0, 1, count) if config.normalize_t else np.arange(count, dtype=np.float64)
    columns = [FUNCTIONS[term](t) if isinstance(term, str) else t**term for term in config.polynomial_terms]
    return np.stack(columns, axis=1)


def _octets(values: np.ndarray, dtype: str) -> np.ndarray:
    cast = np.ascontiguousarray(values.astype(DTYPES[dtype]))
    return cast.view(np.uint8).reshape(len(values), -1)


def pack(numbers: Int[np.ndarray, "S n"], bits: int) -> UInt[np.ndarray, "S bytes"]:
    """Returns numbers of `bits` bits each as bytes, most significant bit first."""
    places = np.arange(bits - 1, -1, -1)
    flat = (numbers[:, :, None] >> places & 1).astype(np.uint8).reshape(len(numbers), -1)
    return np.packbits(flat, axis=1)


def unpack(data: UInt[np.ndarray, "S bytes"], bits: int, count: int) -> Int[np.ndarray, "S n"]:
    """Returns the first `count` numbers of `bits` bits each."""
    flat = np.unpackbits(data, axis=1, count=bits * count)
    return flat.reshape(len(data), count, bits).astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1))
