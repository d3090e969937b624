"""A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU.

The 0.1 M-parameter laptop policy and a 32 B one are two configs of this module. Suffixes name the axes of an array:
B rows, T tokens read, C cache slots, D width, K key/value heads, G query heads per key/value head, H head size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jentropy import base
from jentropy.base import Array


class Cache(NamedTuple):
    """Keys (rotated) and values of the tokens read so far; axis 1 is the row in every leaf.

    Attributes:
      key: `[L, B, K, C, H]`: heads before slots, so that decoding reads them without a transpose.
      value: `[L, B, K, C, H]`.
    """

    key: Array
    value: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What defines a transformer; hashable, so equal configs share one compilation.

    Attributes:
      vocab_size: number of tokens, V.
      width: size of the residual stream, D.
      num_layers: number of blocks, L.
      num_heads: number of query heads, a multiple of `num_kv_heads`.
      num_kv_heads: number of key/value heads.
      head_size: size of one head, even; independent of `width`.
      mlp_width: inner size of the gated MLP.
      rope_theta: base of the rotary wavelengths.
      norm_epsilon: added to the mean square in RMSNorm.
      tied: whether the output head is the embedding.
      attention_bias: whether queries, keys and values have a bias (Qwen2); the output projection never has.
      qk_norm: whether queries and keys pass an RMSNorm per head before the rotation (Qwen3).
      sliding_window: number of tokens attended to, the current one included; None attends to all.
      embedding_std: standard deviation of the embedding at initialisation.
      remat: whether the backward pass recomputes each block instead of keeping its activations.
      dtype: of the activations and the cache, `"float32"` or `"bfloat16"`. Parameters, norms, attention weights and
        rotations are float32.
      scan_unroll: blocks per iteration of the scan over layers; None unrolls all when there are at most 4, else none.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_width: int
    rope_theta: float = 1e4
    norm_epsilon: float = 1e-5
    tied: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    embedding_std: float = 1.0
    remat: bool = False
    dtype: str = "float32"
    scan_unroll: int | None = None

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_size", "mlp_width"):
            base.require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        heads = self.num_heads
        base.require(heads % self.num_kv_heads == 0, "num_heads", heads, f"a multiple of {self.num_kv_heads}")
        base.require(self.head_size % 2 == 0, "head_size", self.head_size, "even")
        base.require(self.rope_theta > 0, "rope_theta", self.rope_theta, "positive")
        base.require(self.norm_epsilon > 0, "norm_epsilon", self.norm_epsilon, "positive")
        base.require(self.embedding_std > 0, "embedding_std", self.embedding_std, "positive")
        base.require(self.dtype in ("float32", "bfloat16"), "dtype", self.dtype, "'float32' or 'bfloat16'")
        for name in ("sliding_window", "scan_unroll"):
            value = getattr(self, name)
            base.require(value is None or value >= 1, name, value, "None or at least 1")

    @property
    def unroll(self) -> int:
        """Blocks per iteration of the scan over layers."""
        default = self.num_layers if self.num_layers <= 4 else 1
        return min(self.scan_unroll or default, self.num_layers)


def _fan_in(shape_in: tuple[int, ...], shape_out: tuple[int, ...]):
    """Truncated normal of variance 1 / (product of the input axes)."""
    return nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=shape_in, out_axis=shape_out)


def _logical(init: Callable[..., Array], *names: str | None) -> Callable[..., Any]:
    """`init` with the logical axis names of its parameter."""
    return nn.with_logical_partitioning(init, names)


def _linear(x: Array, kernel: Array, num_in: int = 1) -> Array:
    """Contracts the last `num_in` axes of `x` `[B, T, ...]` with the first of `kernel`, as one flat matrix product.

    On a CPU the gradient to the weight of a three-dimensional product would cost transposes of all tokens.
    """
    flat = kernel.astype(x.dtype).reshape(int(np.prod(kernel.shape[:num_in])), -1)
    return (x.reshape(-1, flat.shape[0]) @ flat).reshape(*x.shape[:2], *kernel.shape[num_in:])


class RMSNorm(nn.Module):
    """`scale · x / √(mean(x²) + ε)` over the last axis, in float32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", _logical(nn.initializers.ones, None), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.config.norm_epsilon)
        return (wide * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles: `[B or 1, T, H / 2]` float32."""

    cosine: Array
    sine: Array


@functools.lru_cache(maxsize=64)
def _angles(num_positions: int, head_size: int, theta: float) -> np.ndarray:
    """`position · θ^(-2i / H)` for positions from 0: `[positions, H / 2]`, rounded to float32 where Llama rounds.

    Reference: arXiv 2104.09864, eq. 15; the two halves of a head are paired, as in the released Llama code.
    """
    half = head_size // 2
    frequency = np.asarray(theta ** (-np.arange(half) / half), np.float32)
    return np.arange(num_positions, dtype=np.float32)[:, None] * frequency[None, :]


def _rotation(num_positions: int, config: TransformerConfig) -> Rotation:
    """The rotation of positions from 0, as constants: XLA would evaluate sines anew for every row, head and layer."""
    angle = _angles(num_positions, config.head_size, config.rope_theta)[None]
    return Rotation(jnp.asarray(np.cos(angle)), jnp.asarray(np.sin(angle)))


def _rotate(x_BxTxNxH: Array, rotation: Rotation) -> Array:
    cosine, sine = rotation.cosine[:, :, None, :], rotation.sine[:, :, None, :]
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BxTxNxH.dtype)


def _visible(query: Array, key: Array, window: int | None) -> Array:
    """Whether a token at index `query` attends to index `key`, itself included; the two broadcast."""
    causal = key <= query
    return causal if window is None else causal & (key > query - window)


def _attend(q_BxTxKxGxH: Array, k_BxTxKxH: Array, v_BxTxKxH: Array, window: int | None) -> Array:
    """Causal attention of all tokens to all tokens: `[B, T, K, G, H]`."""
    index = jnp.arange(k_BxTxKxH.shape[1], dtype=jnp.int32)
    visible_TxT = _visible(index[:, None], index[None, :], window)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BxTxKxGxH, k_BxTxKxH, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible_TxT[None, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_BxTxKxH.dtype), v_BxTxKxH)


def _attend_cached(q_BxKxGxH, k_BxKxH, v_BxKxH, cache: Cache, position_B: Array, window: int | None) -> Array:
    """Attention of one new token per row to one layer's cache and itself: `[B, K, G, H]`.

    The new key and value are not in the cache yet: layers only read it, and it is written once, after them.
    """
    index, position = jnp.arange(cache.key.shape[2], dtype=jnp.int32)[None, :], position_B[:, None]
    visible_BxC = _visible(position, index, window) & (index != position)
    old = jnp.einsum("bkgh,bkch->bkgc", q_BxKxGxH, cache.key, preferred_element_type=jnp.float32)
    old = jnp.where(visible_BxC[:, None, None, :], old, -jnp.inf)
    new = jnp.einsum("bkgh,bkh->bkg", q_BxKxGxH, k_BxKxH, preferred_element_type=jnp.float32)[..., None]
    maximum = jnp.maximum(jnp.max(old, axis=-1, keepdims=True), new)
    old, new = jnp.exp(old - maximum), jnp.exp(new - maximum)
    dtype = v_BxKxH.dtype
    mixed = jnp.einsum("bkgc,bkch->bkgh", old.astype(dtype), cache.value, preferred_element_type=jnp.float32)
    mixed = mixed + new * v_BxKxH[:, :, None, :].astype(jnp.float32)
    return (mixed / (jnp.sum(old, axis=-1, keepdims=True) + new)).astype(dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; returns the new keys and values beside the mix."""

    config: TransformerConfig

    def _project(self, name: str, axis: str, x_BxTxD: Array, num: int) -> Array:
        config = self.config
        shape = (config.width, num, config.head_size)
        kernel = self.param(name, _logical(_fan_in((0,), (1, 2)), "embed", axis, "head"), shape)
        out = _linear(x_BxTxD, kernel)
        if config.attention_bias:
            bias = self.param(f"{name}_bias", _logical(nn.initializers.zeros, axis, "head"), shape[1:])
            out = out + bias.astype(out.dtype)[None, None]
        return out

    @nn.compact
    def __call__(
        self, x_BxTxD, cache: Cache | None, position_B: Array | None, rotation: Rotation
    ) -> tuple[Array, Cache]:
        config = self.config
        q = self._project("query", "heads", x_BxTxD, config.num_heads)
        k = self._project("key", "kv_heads", x_BxTxD, config.num_kv_heads)
        v = self._project("value", "kv_heads", x_BxTxD, config.num_kv_heads)
        if config.qk_norm:
            q, k = RMSNorm(config, name="query_norm")(q), RMSNorm(config, name="key_norm")(k)
        q, k = _rotate(q, rotation) * np.asarray(config.head_size**-0.5, q.dtype), _rotate(k, rotation)
        q = q.reshape(*q.shape[:2], config.num_kv_heads, -1, config.head_size)
        if cache is None or position_B is None:
            mixed = _attend(q, k, v, config.sliding_window)
        else:
            mixed = _attend_cached(q[:, 0], k[:, 0], v[:, 0], cache, position_B, config.sliding_window)[:, None]
        shape = (config.num_heads, config.head_size, config.width)
        kernel = self.param("output", _logical(_fan_in((0, 1), (2,)), "heads", "head", "embed"), shape)
        mixed = mixed.reshape(*mixed.shape[:2], *shape[:2])
        return _linear(mixed, kernel, num_in=2), Cache(k, v)


class MLP(nn.Module):
    """`(silu(x W_gate) · x W_up) W_down`; arXiv 2002.05202, eq. 5."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BxTxD: Array) -> Array:
        width, inner = self.config.width, self.config.mlp_width
        into = _logical(_fan_in((0,), (1,)), "embed", "mlp")
        gate = self.param("gate", into, (width, inner))
        up = self.param("up", into, (width, inner))
        down = self.param("down", _logical(_fan_in((0,), (1,)), "mlp", "embed"), (inner, width))
        return _linear(nn.silu(_linear(x_BxTxD, gate)) * _linear(x_BxTxD, up), down)


class Block(nn.Module):
    """One layer, in the form that `nn.scan` wants: (carry, layer's cache, ...) -> (carry, layer's new keys, values)."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x_BxTxD, cache: Cache | None, position_B: Array | None, rotation: Rotation
    ) -> tuple[Array, Cache]:
        config = self.config
        x_BxTxD = nn.with_logical_constraint(x_BxTxD, ("batch", None, None))
        normed = RMSNorm(config, name="attention_norm")(x_BxTxD)
        mixed, new = Attention(config, name="attention")(normed, cache, position_B, rotation)
        x_BxTxD = x_BxTxD + mixed
        return x_BxTxD + MLP(config, name="mlp")(RMSNorm(config, name="mlp_norm")(x_BxTxD)), new


class Transformer(nn.Module):
    """Tokens in, hidden states after the final norm out, with the keys and values of the tokens read."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, tokens_BxT: Array, rotation: Rotation, cache: Cache | None = None, position_B: Array | None = None
    ) -> tuple[Array, Cache]:
        config = self.config
        shape = (config.vocab_size, config.width)
        normal = nn.initializers.normal(config.embedding_std)
        embedding = self.param("embedding", _logical(normal, "vocab", "embed"), shape)
        if not config.tied:
            self.param("head", _logical(_fan_in((1,), (0,)), "vocab", "embed"), shape)
        # An unrolled scan is straight-line code: there the recomputation must be kept from being merged away.
        block = nn.remat(Block, prevent_cse=config.unroll > 1) if config.remat else Block
        per_layer: Any = (0, nn.broadcast, nn.broadcast)  # the cache; position and rotation are shared
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=per_layer,
            length=config.num_layers,
            unroll=config.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x = jnp.take(embedding, tokens_BxT, axis=0).astype(config.dtype)
        x, new = layers(config, name="layers")(x, cache, position_B, rotation)
        return RMSNorm(config, name="norm")(x), new


def _write(cache: Array, new: Array, position_B: Array) -> Array:
    """`[L, B, K, C, H]` cache with `new` `[L, B, 1, K, H]` at each row's own slot."""
    here_BxC = jnp.arange(cache.shape[3], dtype=jnp.int32)[None, :] == position_B[:, None]
    return jnp.where(here_BxC[None, :, None, :, None], jnp.swapaxes(new, 2, 3), cache)


@functools.lru_cache(maxsize=64)
def transformer(config: TransformerConfig) -> base.Policy:
    """The policy of `config`; parameters are a nested dict of float32 arrays. Equal configs give the same policy.

    Layers are stacked on a leading axis and scanned. `prefill` returns a `Cache`, whose leaves have the row on axis 1;
    what it holds beyond a row's true length is never attended to, and is overwritten by `decode`.

    Example:
      >>> policy = transformer(LAPTOP)
      >>> params = policy.init(jax.random.key(0))
      >>> policy.hidden(params, jnp.zeros((2, 5), jnp.int32)).shape
      (2, 5, 64)
    """
    module = Transformer(config)
    rolled = Transformer(dataclasses.replace(config, scan_unroll=1))  # draws the same parameters, compiles faster

    def boxed(key: Array) -> Any:
        return rolled.init(key, jnp.zeros((1, 1), jnp.int32), _rotation(1, config))["params"]

    def read(params, tokens):
        chex.assert_rank(tokens, 2)
        return module.apply({"params": params}, tokens, _rotation(tokens.shape[1], config))

    def prefill(params, tokens, capacity):
        room = capacity - tokens.shape[1]
        base.require(room >= 0, "capacity", capacity, f"at least the {tokens.shape[1]} columns of the prompt")
        hidden, cache = read(params, tokens)
        padding = ((0, 0), (0, 0), (0, 0), (0, room), (0, 0))
        return hidden, jax.tree.map(lambda x: jnp.pad(jnp.swapaxes(x, 2, 3), padding), cache)

    def decode(params, token, cache, position):
        chex.assert_rank([token, position], 1)
        table = _rotation(cache.key.shape[3], config)
        rotation = jax.tree.map(lambda x: jnp.take(x[0], position, axis=0)[:, None], table)
        hidden, new = module.apply({"params": params}, token[:, None], rotation, cache, position)
        return hidden[:, 0], jax.tree.map(lambda x, y: _write(x, y, position), cache, new)

    def logical_axes():
        shapes = jax.eval_shape(boxed, jax.random.key(0))
        return jax.tree.map(lambda box: box.names, shapes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))

    return base.Policy(
        init=lambda key: nn.unbox(boxed(key)),
        hidden=lambda params, tokens: read(params, tokens)[0],
        unembed=lambda params: params["embedding" if config.tied else "head"],
        prefill=prefill,
        decode=decode,
        logical_axes=logical_axes,
        vocab_size=config.vocab_size,
    )


LAPTOP = TransformerConfig(
    vocab_size=16, width=64, num_layers=2, num_heads=4, num_kv_heads=4, head_size=16, mlp_width=168
)
"""The policy of the embedded task: 99,648 parameters."""
