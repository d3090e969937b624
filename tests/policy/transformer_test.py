"""The transformer against a NumPy transformer written head by head, its cache against its full forward pass."""

import dataclasses
import functools
import time

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jentropy.policy import LAPTOP, TransformerConfig, transformer

SMALL = TransformerConfig(
    vocab_size=11, width=24, num_layers=2, num_heads=4, num_kv_heads=4, head_size=6, mlp_width=20, rope_theta=100.0
)
VARIANTS = {
    "plain": SMALL,
    "grouped_qk_norm": dataclasses.replace(SMALL, num_kv_heads=2, qk_norm=True),
    "one_kv_head_bias": dataclasses.replace(SMALL, num_kv_heads=1, head_size=8, attention_bias=True),
    "tied_window": dataclasses.replace(SMALL, tied=True, sliding_window=3),
    "deep": dataclasses.replace(SMALL, num_layers=6, num_kv_heads=2, scan_unroll=2, remat=True),
}


@functools.lru_cache
def compiled(config):
    """The policy with jitted functions: a scan that runs outside jit is compiled anew at every call."""
    policy = transformer(config)
    return policy._replace(
        init=jax.jit(policy.init),
        hidden=jax.jit(policy.hidden),
        prefill=jax.jit(policy.prefill, static_argnums=2),
        decode=jax.jit(policy.decode),
    )


@functools.lru_cache
def make_params(config):
    """Random numbers in every leaf, biases and norm scales too."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(transformer(config).init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0.2, 0.4, x.shape), x.dtype), shapes)


def make_tokens(config, rows=3, columns=9):
    return jax.random.randint(jax.random.key(7), (rows, columns), 0, config.vocab_size, jnp.int32)


def reference_norm(x, scale, config):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale


def reference_rotate(x, position, config):
    half = config.head_size // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * config.rope_theta ** (-2 * i / config.head_size)
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def reference_attention(x, p, config):
    """`[T, D]` -> `[T, D]`, one head and one position at a time."""
    out = np.zeros_like(x)
    for head in range(config.num_heads):
        kv = head // (config.num_heads // config.num_kv_heads)
        projected = []
        for name, index in (("query", head), ("key", kv), ("value", kv)):
            y = x @ p[name][:, index]
            if config.attention_bias:
                y = y + p[f"{name}_bias"][index]
            if config.qk_norm and name != "value":
                y = reference_norm(y, p[f"{name}_norm"]["scale"], config)
            if name != "value":
                y = np.stack([reference_rotate(row, t, config) for t, row in enumerate(y)])
            projected.append(y)
        q, k, v = projected
        for t in range(len(x)):
            first = 0 if config.sliding_window is None else max(0, t - config.sliding_window + 1)
            score = np.array([q[t] @ k[s] for s in range(first, t + 1)]) / np.sqrt(config.head_size)
            weight = np.exp(score - score.max())
            out[t] += (weight / weight.sum()) @ v[first : t + 1] @ p["output"][head]
    return out


@functools.lru_cache
def reference_hidden(config):
    """Hidden states `[B, T, D]` in float64."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), make_params(config))
    rows = []
    for row in np.asarray(make_tokens(config)):
        x = params["embedding"][row]
        for layer in range(config.num_layers):
            p = jax.tree.map(lambda a, layer=layer: a[layer], params["layers"])
            x = x + reference_attention(reference_norm(x, p["attention_norm"]["scale"], config), p["attention"], config)
            y = reference_norm(x, p["mlp_norm"]["scale"], config)
            gate = y @ p["mlp"]["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ p["mlp"]["up"])) @ p["mlp"]["down"]
        rows.append(reference_norm(x, params["norm"]["scale"], config))
    return np.stack(rows)


@pytest.mark.parametrize("name", ["plain", "deep"])
def test_hidden_equals_reference(name):
    config = VARIANTS[name]
    hidden = compiled(config).hidden(make_params(config), make_tokens(config))
    np.testing.assert_allclose(hidden, reference_hidden(config), atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_decode_of_ragged_rows_equal_the_full_reference(name):
    config = VARIANTS[name]
    policy, params, tokens, full = compiled(config), make_params(config), make_tokens(config), reference_hidden(config)
    length, columns = jnp.array([2, 4, 1], jnp.int32), 4
    real = jnp.arange(columns)[None, :] < length[:, None]
    hidden, cache = policy.prefill(params, jnp.where(real, tokens[:, :columns], 10), 9)
    np.testing.assert_allclose(hidden[real], full[:, :columns][real], atol=2e-5)
    for position in length[None, :] + jnp.arange(5, dtype=jnp.int32)[:, None]:
        rows = jnp.arange(3, dtype=jnp.int32)
        hidden, cache = policy.decode(params, tokens[rows, position], cache, position)
        np.testing.assert_allclose(hidden, full[rows, position], atol=2e-5)


def test_prefill_equals_hidden_and_cache_has_rows_on_axis_one():
    policy, params, tokens = compiled(SMALL), make_params(SMALL), make_tokens(SMALL)
    hidden, cache = policy.prefill(params, tokens, 12)
    chex.assert_trees_all_close(hidden, policy.hidden(params, tokens), atol=1e-6)
    chex.assert_shape(list(cache), (2, 3, 4, 12, 6))
    with pytest.raises(ValueError, match="capacity must be at least the 9 columns"):
        policy.prefill(params, tokens, 8)


def test_future_and_padding_do_not_reach_back():
    policy, params, tokens = compiled(SMALL), make_params(SMALL), make_tokens(SMALL)
    changed = tokens.at[:, 5:].set((tokens[:, 5:] + 1) % SMALL.vocab_size)
    before, after = policy.hidden(params, tokens), policy.hidden(params, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert float(jnp.abs(before[:, 5:] - after[:, 5:]).min(axis=(0, 2)).max()) > 0


def test_laptop_policy_has_99648_parameters_as_a_plain_float32_dict():
    params = compiled(LAPTOP).init(jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == 99_648
    assert all(isinstance(x, jax.Array) and x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert type(params) is dict and type(params["layers"]["mlp"]) is dict
    np.testing.assert_allclose(params["embedding"].std(), 1.0, atol=0.1)
    np.testing.assert_allclose(params["head"].std(), 64**-0.5, atol=0.02)
    np.testing.assert_allclose(params["layers"]["mlp"]["down"].std(axis=(1, 2)), 168**-0.5, rtol=0.05)
    np.testing.assert_allclose(params["layers"]["attention"]["output"].std(axis=(1, 2, 3)), 64**-0.5, rtol=0.05)
    assert not np.array_equal(*params["layers"]["mlp"]["gate"])


def test_32b_policy_is_shaped_quickly_and_has_the_published_count():
    config = TransformerConfig(
        vocab_size=152_064,
        width=5120,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        head_size=128,
        mlp_width=27_648,
        rope_theta=1e6,
        norm_epsilon=1e-6,
        attention_bias=True,
        embedding_std=0.02,
        remat=True,
        dtype="bfloat16",
    )
    start = time.perf_counter()
    policy = transformer(config)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    hidden = jax.eval_shape(policy.hidden, params, jax.ShapeDtypeStruct((8, 128), jnp.int32))
    assert time.perf_counter() - start < 5.0
    assert sum(x.size for x in jax.tree.leaves(params)) == 32_763_876_352
    chex.assert_shape(hidden, (8, 128, 5120))
    chex.assert_shape(policy.unembed(params), (152_064, 5120))


@pytest.mark.parametrize("name", ["one_kv_head_bias", "tied_window", "grouped_qk_norm"])
def test_logical_axes_name_every_dimension(name):
    policy = compiled(VARIANTS[name])
    params, axes = make_params(VARIANTS[name]), policy.logical_axes()

    def is_names(x):
        return isinstance(x, tuple)

    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=is_names)
    for x, names in zip(jax.tree.leaves(params), jax.tree.leaves(axes, is_leaf=is_names)):
        assert len(names) == x.ndim
    assert axes["layers"]["attention"]["key"] == ("layers", "embed", "kv_heads", "head")
    assert axes["layers"]["attention"]["output"] == ("layers", "heads", "head", "embed")
    assert axes["layers"]["mlp"]["down"] == ("layers", "mlp", "embed")
    assert axes["embedding"] == ("vocab", "embed")


def test_unembed_is_the_head_or_the_tied_embedding():
    for name, leaf in (("plain", "head"), ("tied_window", "embedding")):
        params = make_params(VARIANTS[name])
        assert transformer(VARIANTS[name]).unembed(params) is params[leaf]
    assert "head" not in make_params(VARIANTS["tied_window"])


@pytest.mark.parametrize("changes", [{"remat": True}, {"scan_unroll": 1}, {"scan_unroll": 1, "remat": True}])
def test_remat_and_unrolling_change_no_value_and_no_gradient(changes):
    params, tokens = make_params(SMALL), make_tokens(SMALL)

    def value_and_grad(config):
        policy = transformer(config)
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(policy.hidden(p, tokens)))))(params)

    changed = dataclasses.replace(SMALL, **changes)
    chex.assert_trees_all_close(value_and_grad(changed), value_and_grad(SMALL), atol=2e-5, rtol=2e-5)


def test_gradient_of_scanned_layers_does_not_keep_keys_and_values():
    config = dataclasses.replace(SMALL, num_layers=32, scan_unroll=1, remat=True, width=8, mlp_width=8)
    policy, tokens = transformer(config), jnp.zeros((4, 64), jnp.int32)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(policy.hidden(p, tokens))))
    memory = gradient.lower(jax.eval_shape(policy.init, jax.random.key(0))).compile().memory_analysis()
    residual_stream = 4 * config.num_layers * tokens.size * config.width
    keys_and_values = 2 * residual_stream * config.num_heads * config.head_size // config.width
    assert memory.temp_size_in_bytes < residual_stream + keys_and_values


def test_bfloat16_activations_stay_near_float32():
    params, tokens = make_params(SMALL), make_tokens(SMALL)
    policy = compiled(dataclasses.replace(SMALL, dtype="bfloat16"))
    hidden, cache = policy.prefill(params, tokens[:, :8], 9)
    assert hidden.dtype == cache.key.dtype == jnp.bfloat16
    hidden, _ = policy.decode(params, tokens[:, 8], cache, jnp.full((3,), 8, jnp.int32))
    exact = compiled(SMALL).hidden(params, tokens)[:, 8]
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact, atol=0.1)


def test_logical_rules_shard_the_rows_without_changing_them():
    policy, params, tokens = compiled(SMALL), make_params(SMALL), make_tokens(SMALL)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    expected = policy.hidden(params, tokens)
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", "data"),)):
        lowered = jax.jit(transformer(SMALL).hidden).lower(params, tokens)
        np.testing.assert_allclose(lowered.compile()(params, tokens), expected, atol=1e-6)
    assert "sharding_constraint" in lowered.as_text()


def test_equal_configs_share_one_policy():
    assert transformer(SMALL) is transformer(dataclasses.replace(SMALL))
    assert transformer(SMALL) != transformer(VARIANTS["tied_window"])
    assert hash(transformer(SMALL)) == hash(transformer(dataclasses.replace(SMALL)))


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 0},
        {"num_layers": 0},
        {"num_kv_heads": 3},
        {"head_size": 5},
        {"rope_theta": 0.0},
        {"norm_epsilon": 0.0},
        {"embedding_std": -1.0},
        {"dtype": "float16"},
        {"sliding_window": 0},
        {"scan_unroll": 0},
    ],
)
def test_bad_values_are_refused_by_name(changes):
    (name, value), *_ = changes.items()
    named = "num_heads" if name == "num_kv_heads" else name
    with pytest.raises(ValueError, match=f"{named} must be .*, got {4 if name == 'num_kv_heads' else value!r}"):
        dataclasses.replace(SMALL, **changes)
