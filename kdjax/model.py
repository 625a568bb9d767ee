"""The student: a decoder-only GPT whose options cover Megatron's GPT, Llama, Qwen and GPT-2.

The layers are stacked: each of their parameters is one array with a leading axis L, and the forward pass scans
over it. Compile time therefore does not grow with depth, and a pipeline can cut the stack anywhere.
Training holds the parameters as a plain nested dict (`init_params`) and binds them to the module (`bind`) inside
the jitted step.

With tensor parallelism (Megatron's, arXiv:1909.08053) each device binds its part of the heads, of the MLP's width and
of the vocabulary (`param_axes`, `shard_config`). Two sums connect the parts, `sum_over_tensor` in the forward pass and
`copy_to_tensor` in the backward pass; every device holds the whole residual stream. A pipeline stage binds some of the
layers.
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kdjax.config import ModelConfig
from kdjax.parallel import collectives
from kdjax.parallel.axes import LAYERS, VOCABULARY, WIDTH
from kdjax.parallel.mesh import Shards

log = logging.getLogger("kdjax")
Params = dict[str, Any]

WHOLE = Shards()

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "swiglu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}


class Norm(nnx.Module):
    """LayerNorm, LayerNorm with zero-centred scale ("1p", Megatron) or RMSNorm, in float32 over the last axis."""

    def __init__(self, shape: tuple[int, ...], kind: str, eps: float, dtype: jnp.dtype, per_shard: bool = False):
        self.kind, self.eps = kind, eps
        self.per_shard = per_shard  # whether tensor shards apply the one scale to different vectors
        first = jnp.zeros if kind == "layernorm_1p" else jnp.ones
        self.scale = nnx.Param(first(shape, dtype))
        self.bias = None if kind == "rmsnorm" else nnx.Param(jnp.zeros(shape, dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        if self.bias is not None:
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        scale = collectives.copy_to_tensor(scale) if self.per_shard else scale
        x32 = x32 * (1 + scale if self.kind == "layernorm_1p" else scale)
        if self.bias is not None:
            x32 = x32 + self.bias[...].astype(jnp.float32)
        return x32.astype(x.dtype)


class Linear(nnx.Module):
    """A linear map between named axes, written as an einsum whose upper-case letters are the shape legend."""

    def __init__(
        self,
        einsum: str,
        shape: tuple[int, ...],
        bias_shape: tuple[int, ...] | None,
        std: float,
        init: "Init",
        sum_shards: bool = False,
    ):
        self.einsum, self.dtype, self.sum_shards = einsum, init.dtype, sum_shards
        self.kernel = nnx.Param(init.normal(shape, std))
        self.bias = None if bias_shape is None else nnx.Param(init.zeros(bias_shape))

    def __call__(self, x: Array) -> Array:
        y = jnp.einsum(self.einsum, x, self.kernel[...].astype(self.dtype))
        y = collectives.sum_over_tensor(y) if self.sum_shards else y
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Init:
    """Draws the initial arrays of a stack of layers: every shape gets the leading axis L."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, shards: Shards):
        self.rngs, self.layers, self.split = rngs, config.layers, shards.width > 1
        self.dtype, self.param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)

    def normal(self, shape: tuple[int, ...], std: float) -> Array:
        return std * jax.random.normal(self.rngs.params(), (self.layers, *shape), self.param_dtype)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return jnp.zeros((self.layers, *shape), self.param_dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries, rotary positions and an optional norm on queries and keys."""

    def __init__(self, config: ModelConfig, init: Init):
        D, N, G, H = config.d_model, config.n_heads, config.groups, config.head_width
        qkv_bias = config.bias or config.qkv_bias
        self.config = config
        self.q = Linear("BTD,DNH->BTNH", (D, N, H), (N, H) if qkv_bias else None, config.init_std, init)
        self.k = Linear("BSD,DGH->BSGH", (D, G, H), (G, H) if qkv_bias else None, config.init_std, init)
        self.v = Linear("BSD,DGH->BSGH", (D, G, H), (G, H) if qkv_bias else None, config.init_std, init)
        self.o = Linear("BTNH,NHD->BTD", (N, H, D), (D,) if config.bias else None, output_std(config), init, init.split)
        norm = functools.partial(Norm, (config.layers, H), "rmsnorm", config.norm_eps, init.param_dtype, init.split)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None

    def __call__(
        self,
        x_BxTxD: Array,
        positions_BxT: Array,
        segment_ids_BxT: Array | None,
    ) -> Array:
        q_BxTxNxH, k_BxSxGxH, v_BxSxGxH = self.q(x_BxTxD), self.k(x_BxTxD), self.v(x_BxTxD)
        if self.q_norm is not None and self.k_norm is not None:
            q_BxTxNxH, k_BxSxGxH = self.q_norm(q_BxTxNxH), self.k_norm(k_BxSxGxH)
        if self.config.position == "rope":
            rotate = functools.partial(rope, positions_BxT=positions_BxT, config=self.config)
            q_BxTxNxH, k_BxSxGxH = rotate(q_BxTxNxH), rotate(k_BxSxGxH)
        same_document_Bx1xTxS = None
        if segment_ids_BxT is not None:
            same_document_Bx1xTxS = (segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :])[:, None]
        # A row's padding comes last, so the causal mask alone keeps it from every real token.
        out_BxTxNxH = jax.nn.dot_product_attention(
            q_BxTxNxH,
            k_BxSxGxH,
            v_BxSxGxH,
            mask=same_document_Bx1xTxS,
            is_causal=True,
            implementation=cast(Literal["xla", "cudnn"], attention_implementation(self.config)),
        )
        return self.o(out_BxTxNxH)


class MLP(nnx.Module):
    """Up-projection, activation, down-projection; SwiGLU multiplies by a second up-projection, the gate."""

    def __init__(self, config: ModelConfig, init: Init):
        D, F = config.d_model, config.d_ff
        bias = (F,) if config.bias else None
        self.activation = config.activation
        self.up = Linear("BTD,DF->BTF", (D, F), bias, config.init_std, init)
        gated = config.activation == "swiglu"
        self.gate = Linear("BTD,DF->BTF", (D, F), bias, config.init_std, init) if gated else None
        bias = (D,) if config.bias else None
        self.down = Linear("BTF,FD->BTD", (F, D), bias, output_std(config), init, init.split)

    def __call__(self, x_BxTxD: Array) -> Array:
        activate = ACTIVATIONS[self.activation]
        up_BxTxF = self.up(x_BxTxD)
        if self.gate is None:
            return self.down(activate(up_BxTxF))
        return self.down(activate(self.gate(x_BxTxD)) * up_BxTxF)


class Layer(nnx.Module):
    """A pre-norm transformer layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, init: Init):
        shape = (config.layers, config.d_model)
        self.attn_norm = Norm(shape, config.norm, config.norm_eps, init.param_dtype)
        self.attn = Attention(config, init)
        self.mlp_norm = Norm(shape, config.norm, config.norm_eps, init.param_dtype)
        self.mlp = MLP(config, init)
        self.enter = collectives.copy_to_tensor if init.split else lambda x: x

    def __call__(self, x_BxTxD: Array, positions_BxT: Array, segment_ids_BxT: Array | None) -> Array:
        x_BxTxD = x_BxTxD + self.attn(self.enter(self.attn_norm(x_BxTxD)), positions_BxT, segment_ids_BxT)
        return x_BxTxD + self.mlp(self.enter(self.mlp_norm(x_BxTxD)))


class GPT(nnx.Module):
    """A GPT from tokens to logits. `hidden` stops before the unembedding, which the fused loss applies itself.

    With `shards`, the module is one device's part and `config` a `shard_config`; it cannot compute logits.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, shards: Shards = WHOLE):
        init = Init(config, rngs, shards)
        V, D = config.vocab_rows, config.d_model
        draw = functools.partial(jax.random.normal, dtype=init.param_dtype)
        self.config, self.splits_vocabulary = config, shards.vocabulary > 1
        self.embed = nnx.Param(config.init_std * draw(rngs.params(), (V, D)))
        table = (config.max_positions or 0, D)
        learned = config.position == "learned"
        self.positions = nnx.Param(config.init_std * draw(rngs.params(), table)) if learned else None
        self.layers = Layer(config, init)
        self.final_norm = Norm((D,), config.norm, config.norm_eps, init.param_dtype)
        self.unembed = None if config.tied else nnx.Param(config.init_std * draw(rngs.params(), (V, D)))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits over the true (unpadded) vocabulary. Positions default to 0 .. T-1."""
        x_BxTxD = self.hidden(tokens, positions, segment_ids)
        unembed_VxD = self.unembedding()[: self.config.vocab_size].astype(x_BxTxD.dtype)
        return jnp.einsum("BTD,VD->BTV", x_BxTxD, unembed_VxD, preferred_element_type=jnp.float32)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream after the last norm, in `config.dtype`."""
        return self.final_norm(self.through(self.enter(tokens, positions), positions, segment_ids))

    def enter(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """Returns the residual stream before the first layer, in `config.dtype`."""
        embed_VxD = self.embed[...]
        if self.splits_vocabulary:
            rows = tokens - collectives.vocabulary_index() * embed_VxD.shape[0]
            here = (rows >= 0) & (rows < embed_VxD.shape[0])
            x_BxTxD = jnp.where(here[..., None], embed_VxD[jnp.where(here, rows, 0)], 0)
            # All summands but one are zero, so rounding first changes only the number of bytes sent.
            x_BxTxD = collectives.sum_over_vocabulary(
                x_BxTxD if self.positions is not None else x_BxTxD.astype(self.config.dtype)
            )
        else:
            x_BxTxD = embed_VxD[tokens]
        if self.positions is not None:
            x_BxTxD = x_BxTxD + self.positions[...][_default_positions(positions, tokens.shape)]
        return x_BxTxD.astype(self.config.dtype)

    def through(
        self,
        x_BxTxD: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream after the layers that are bound."""
        positions = _default_positions(positions, x_BxTxD.shape[:2])
        graph, stacked = nnx.split(self.layers)

        def one_layer(x_BxTxD: Array, params: Any) -> tuple[Array, None]:
            return nnx.merge(graph, params)(x_BxTxD, positions, segment_ids), None

        return jax.lax.scan(rematerialise(one_layer, self.config.remat), x_BxTxD, stacked)[0]

    def unembedding(self) -> Float[Array, "V D"]:
        """Returns the output matrix with its padded rows, in the dtype of the parameters."""
        return self.embed[...] if self.unembed is None else self.unembed[...]


def _default_positions(positions: Array | None, shape: tuple[int, ...]) -> Int[Array, "B T"]:
    """Returns the positions, by default 0 .. T-1 in each row."""
    return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape) if positions is None else positions


def output_std(config: ModelConfig) -> float:
    """Returns the initial standard deviation of the maps that write to the residual stream (GPT-2's scaled init)."""
    return config.init_std / (2 * config.layers) ** 0.5 if config.scaled_init else config.init_std


def rope(x_BxTxNxH: Array, positions_BxT: Array, config: ModelConfig) -> Array:
    """Rotates the leading `rope_fraction` of each head, half against half, as Megatron and Hugging Face do."""
    rotated = int(x_BxTxNxH.shape[-1] * config.rope_fraction)
    angle_BxTx1xR = positions_BxT[..., None, None].astype(jnp.float32) * rope_frequencies(config, rotated)
    cos, sin = jnp.cos(angle_BxTx1xR), jnp.sin(angle_BxTx1xR)
    first, second, rest = jnp.split(x_BxTxNxH, [rotated // 2, rotated], axis=-1)
    a, b = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxNxH.dtype)
    return jnp.concatenate([turned, rest], axis=-1)


def rope_frequencies(config: ModelConfig, rotated: int) -> Float[Array, "R"]:
    """Returns the radians per position of each of the `rotated` / 2 planes, scaled by Llama 3's rule or linearly.

    Llama 3's rule (Hugging Face's `rope_type` "llama3"): frequencies that complete fewer than `low` turns in the
    `original` positions are divided by `factor`, those above `high` turns are kept, and those between are interpolated.
    """
    frequency = config.rope_theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    if config.rope_llama3 is not None:
        factor, low, high, original = config.rope_llama3
        turns = original * frequency / (2 * jnp.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    return frequency / config.rope_linear_factor


def rematerialise(layer: Any, policy: str) -> Any:
    """Returns the layer with a backward pass that recomputes nothing, all but matmul results, or everything."""
    if policy == "none":
        return layer
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(layer, policy=keep, prevent_cse=False)


@functools.cache
def attention_implementation(config: ModelConfig) -> str:
    """Returns the kernel of `jax.nn.dot_product_attention`. cuDNN takes 16-bit heads of width up to 128, on GPUs."""
    if config.attention is not None:
        return config.attention
    width = config.head_width
    fits = jnp.dtype(config.dtype).itemsize == 2 and width <= 128 and width % 8 == 0
    chosen = "cudnn" if fits and jax.default_backend() == "gpu" else "xla"
    log.info("attention: %s (model.attention is not set)", chosen)
    return chosen


@functools.cache
def _skeleton(config: ModelConfig, shards: Shards = WHOLE) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0), shards=shards)), nnx.Param)


def param_shapes(config: ModelConfig) -> Params:
    """Returns the shapes and dtypes of the parameters, as a nested dict."""
    return nnx.to_pure_dict(_skeleton(config)[1])


def named_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns each parameter's shape by its name; those below "layers/" have the axis L."""
    leaves = jax.tree_util.tree_leaves_with_path(param_shapes(config))
    return {param_name(path): tuple(leaf.shape) for path, leaf in leaves}


def init_params(config: ModelConfig, key: jax.Array | int) -> Params:
    """Draws parameters from a key or seed, as a nested dict of arrays; those below "layers" have a leading axis L."""
    return nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(key)), nnx.Param))


# For each stacked parameter (L is axis 0), the axis that counts heads or the MLP's width.
_WIDTH_AXES = {
    **{f"attn/{name}/kernel": 2 for name in "qkv"},
    **{f"attn/{name}/bias": 1 for name in "qkv"},
    "attn/o/kernel": 1,
    **{f"mlp/{name}/kernel": 2 for name in ("up", "gate")},
    **{f"mlp/{name}/bias": 1 for name in ("up", "gate")},
    "mlp/down/kernel": 1,
}


def param_axes(config: ModelConfig) -> dict[str, Any]:
    """Returns for each parameter a tuple with what each axis counts, or None where a mesh never splits the axis."""

    def axes(path: Any, leaf: jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
        group, _, name = param_name(path).partition("/")
        counts: dict[int, str] = {}
        if group in ("embed", "unembed"):
            counts[0] = VOCABULARY
        elif group == "layers":
            counts[0] = LAYERS
        if name in _WIDTH_AXES:
            counts[_WIDTH_AXES[name]] = WIDTH
        return tuple(counts.get(i) for i in range(len(leaf.shape)))

    return jax.tree_util.tree_map_with_path(axes, param_shapes(config))


def in_compute_dtype(config: ModelConfig, params: Params) -> Params:
    """Rounds to `config.dtype` the parameters that every use would round first.

    Gathering and copying them then takes half the bytes and gives the same numbers. Norms and the embedding are kept:
    norms are computed in float32, and the embedding's gradient is accumulated row by row.
    """
    rounded = re.compile(r"layers/(attn|mlp)/\w+/(kernel|bias)|unembed")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(config.dtype) if rounded.fullmatch(param_name(path)) else x, params
    )


def param_name(path: Any) -> str:
    """Returns a parameter's name, such as "layers/attn/q/kernel", from its path in the tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shard_config(config: ModelConfig, shards: Shards) -> ModelConfig:
    """Returns the architecture of one device's part; `validate_split` has checked that the sizes divide."""
    return dataclasses.replace(
        config,
        n_heads=config.n_heads // shards.width,
        n_groups=config.groups // shards.width,
        head_dim=config.head_width,
        d_ff=config.d_ff // shards.width,
        padded_vocab_size=config.vocab_rows // shards.vocabulary,
    )


def bind(config: ModelConfig, params: Params, shards: Shards = WHOLE) -> GPT:
    """Returns the module over these parameters. With only some of them, only what they suffice for works.

    With `shards`, the parameters are one device's part. Only inside `per_device` then.
    """
    graph, shapes = _skeleton(shard_config(config, shards), shards)
    state = jax.tree.map(lambda x: x, shapes)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
