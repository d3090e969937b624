"""The sampler against the policy's full forward pass, and on a Markov chain whose distribution is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jentropy import base, features
from jentropy.policy import TransformerConfig, transformer
from jentropy.rollout import sample
from jentropy.samplers import combine, compiled_part, e3_temperature, entropy_temperature, plain, top_k, top_p

CONFIG = TransformerConfig(
    vocab_size=9, width=16, num_layers=1, num_heads=4, num_kv_heads=2, head_size=4, mlp_width=24, rope_theta=100.0
)
PAD, EOS = 7, 8
EVERY_TOKEN = jnp.ones((9,), bool)
LENGTH = jnp.array([2, 5, 1, 4], jnp.int32)


@functools.lru_cache
def make_params():
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(transformer(CONFIG).init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0.0, 0.4, x.shape), x.dtype), shapes)


@jax.jit
def make_logits(tokens):
    policy = transformer(CONFIG)
    return jnp.einsum("btd,vd->btv", policy.hidden(make_params(), tokens), policy.unembed(make_params()))


def make_prompts():
    prompts = jax.random.randint(jax.random.key(3), (4, 5), 0, PAD, jnp.int32)
    return jnp.where(jnp.arange(5)[None, :] < LENGTH[:, None], prompts, PAD)


@functools.partial(
    jax.jit, static_argnames=("policy", "num_generations", "max_new_tokens", "eos_id", "pad_id", "greedy", "sampler")
)
def run(policy, params, prompts, length, row_id, key, **options):
    return sample(policy, params, prompts, length, row_id, key, **options)


def run_small(prompts=None, length=LENGTH, row_id=None, seed=0, **options):
    policy = transformer(CONFIG)
    defaults = {"num_generations": 3, "max_new_tokens": 6, "temperature": jnp.float32(1.0), "vocab_mask": EVERY_TOKEN}
    options = defaults | options
    prompts = make_prompts() if prompts is None else prompts
    row_id = jnp.arange(len(prompts) * options["num_generations"], dtype=jnp.int32) if row_id is None else row_id
    return run(policy, make_params(), prompts, length, row_id, jax.random.key(seed), eos_id=EOS, pad_id=PAD, **options)


def using(sampler):
    """The options of a sampler; those that differ in numbers share a compilation."""
    return {"sampler": compiled_part(sampler), "sampler_state": sampler.init()}


def rescore(samples, temperature=1.0, vocab_mask=None):
    """Log-probability and entropy `[B, T]` from the full forward pass, 0 outside the response."""
    temperature = samples.temperature[:, 1:] if samples.temperature is not None else temperature
    logits = make_logits(samples.tokens)[:, :-1]
    log_prob = features.log_prob(logits, samples.tokens[:, 1:], temperature=temperature, vocab_mask=vocab_mask)
    entropy = features.entropy(logits, temperature=temperature, vocab_mask=vocab_mask)
    mask = samples.response_mask[:, 1:]
    return [jnp.pad(jnp.where(mask, x, 0.0), ((0, 0), (1, 0))) for x in (log_prob, entropy)]


def markov(table, on_decode=lambda: None):
    """A policy whose next token depends on the last one only: logits `table[token]`. Its cache is empty."""
    size = len(table)

    def decode(params, token, cache, position):
        jax.debug.callback(on_decode)
        return jax.nn.one_hot(token, size, dtype=jnp.float32), cache

    def hidden(params, tokens):
        return jax.nn.one_hot(tokens, size, dtype=jnp.float32)

    return base.Policy(
        init=lambda key: None,
        hidden=hidden,
        unembed=lambda params: jnp.asarray(table, jnp.float32).T,
        prefill=lambda params, tokens, capacity: (hidden(params, tokens), ()),
        decode=decode,
        logical_axes=lambda: None,
        vocab_size=size,
    )


def run_markov(policy, rows, *, temperature=1.0, max_new_tokens=4, **options):
    return run(
        policy,
        None,
        jnp.zeros((1, 1), jnp.int32),
        jnp.ones((1,), jnp.int32),
        jnp.arange(rows, dtype=jnp.int32),
        jax.random.key(5),
        num_generations=rows,
        max_new_tokens=max_new_tokens,
        eos_id=len(policy.unembed(None)) - 1,
        pad_id=0,
        temperature=jnp.float32(temperature),
        **options,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("greedy", [False, True])
def test_log_prob_and_entropy_are_those_of_the_full_pass(temperature, greedy):
    samples = run_small(temperature=jnp.float32(temperature), greedy=greedy)
    log_prob, entropy = rescore(samples, temperature)
    np.testing.assert_allclose(samples.log_prob, log_prob, atol=1e-5)
    np.testing.assert_allclose(samples.entropy, entropy, atol=1e-5)


def test_prompt_and_response_are_contiguous_and_padded():
    samples = run_small()
    assert samples.tokens.shape == (12, 11)
    for row in range(12):
        prompt, start, count = make_prompts()[row // 3], int(LENGTH[row // 3]), int(samples.num_tokens[row])
        response = np.asarray(samples.tokens[row, start : start + count])
        np.testing.assert_array_equal(samples.tokens[row, :start], prompt[:start])
        np.testing.assert_array_equal(samples.tokens[row, start + count :], PAD)
        np.testing.assert_array_equal(np.flatnonzero(samples.response_mask[row]), start + np.arange(count))
        assert bool(samples.truncated[row]) == (EOS not in response)
        assert count == 6 if samples.truncated[row] else response.tolist().index(EOS) == count - 1
    assert {bool(x) for x in samples.truncated} == {True, False}
    outside = ~np.asarray(samples.response_mask)
    assert not np.any(np.asarray(samples.log_prob)[outside]) and not np.any(np.asarray(samples.entropy)[outside])


def test_dtypes():
    samples = run_small()
    assert samples.tokens.dtype == samples.num_tokens.dtype == jnp.int32
    assert samples.log_prob.dtype == samples.entropy.dtype == jnp.float32
    assert samples.response_mask.dtype == samples.truncated.dtype == jnp.bool_


def test_same_key_same_samples_other_key_others():
    first, second, third = run_small(), run_small(), run_small(seed=1)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert np.any(first.tokens != third.tokens)


def test_permuted_prompts_with_their_row_ids_permute_the_samples():
    order, rows = np.array([2, 0, 3, 1]), np.arange(12).reshape(4, 3)
    samples = run_small()
    permuted = run_small(make_prompts()[order], LENGTH[order], jnp.asarray(rows[order].reshape(-1), jnp.int32))
    expected = jax.tree.map(lambda x: x[rows[order].reshape(-1)], samples)
    np.testing.assert_array_equal(permuted.tokens, expected.tokens)
    np.testing.assert_array_equal(permuted.truncated, expected.truncated)
    np.testing.assert_allclose(permuted.log_prob, expected.log_prob, atol=2e-6)


def test_wider_bucket_and_more_rows_change_no_draw():
    samples = run_small()
    wide = run_small(jnp.pad(make_prompts(), ((0, 0), (0, 3)), constant_values=1))
    np.testing.assert_array_equal(wide.tokens[:, :11], samples.tokens)
    np.testing.assert_allclose(wide.log_prob[:, :11], samples.log_prob, atol=2e-6)
    more = run_small(jnp.concatenate([make_prompts(), make_prompts()]), jnp.concatenate([LENGTH, LENGTH]))
    np.testing.assert_array_equal(more.tokens[:12], samples.tokens)
    assert np.any(more.tokens[12:] != samples.tokens)


def test_shorter_budget_is_a_prefix():
    long, short = run_small(), run_small(max_new_tokens=2)
    mask = short.response_mask
    np.testing.assert_array_equal(short.tokens, jnp.where(mask, long.tokens[:, :7], short.tokens))
    np.testing.assert_array_equal(short.num_tokens, jnp.minimum(long.num_tokens, 2))


def test_greedy_takes_the_most_probable_token_of_the_full_pass():
    samples = run_small(greedy=True, num_generations=1)
    best = jnp.pad(jnp.argmax(make_logits(samples.tokens), axis=-1)[:, :-1], ((0, 0), (1, 0)))
    np.testing.assert_array_equal(jnp.where(samples.response_mask, samples.tokens - best, 0), 0)
    jax.tree.map(np.testing.assert_array_equal, samples, run_small(greedy=True, num_generations=1, seed=9))


def test_vocab_mask_bars_tokens_and_renormalises():
    allowed = jnp.array([True, False, True, False, True, False, True, False, True])
    for greedy in (False, True):
        samples = run_small(vocab_mask=allowed, greedy=greedy)
        drawn = np.asarray(samples.tokens)[np.asarray(samples.response_mask)]
        assert set(drawn.tolist()) <= {0, 2, 4, 6, 8}
        log_prob, entropy = rescore(samples, vocab_mask=allowed)
        np.testing.assert_allclose(samples.log_prob, log_prob, atol=1e-5)
        np.testing.assert_allclose(samples.entropy, entropy, atol=1e-5)


def test_end_of_sequence_may_come_first_and_ends_the_loop():
    calls = []
    never = np.array([[0.0, 0.0, -1e9]] * 3)
    soon = np.array([[-1e9, 0.0, -1e9], [-1e9, -1e9, 0.0], [0.0, 0.0, 0.0]])
    at_once = np.array([[-1e9, -1e9, 0.0]] * 3)
    for table, num_tokens, num_decoded in ((never, 40, 39), (soon, 2, 1), (at_once, 1, 0)):
        calls.clear()
        samples = run_markov(markov(table, lambda: calls.append(1)), 4, max_new_tokens=40)
        jax.block_until_ready(samples)
        jax.effects_barrier()
        assert len(calls) == num_decoded
        np.testing.assert_array_equal(samples.num_tokens, num_tokens)
        np.testing.assert_array_equal(samples.truncated, num_tokens == 40)
        np.testing.assert_array_equal(samples.response_mask.sum(axis=1), num_tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_softmax(temperature):
    table = np.array([[1.0, 0.0, -0.5, -1.0], [-1.0, 0.7, 0.2, -2.0], [0.0, 0.0, 2.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    samples = run_markov(markov(table), 20_000, temperature=temperature, max_new_tokens=2)
    probability = np.exp(table / temperature) / np.exp(table / temperature).sum(1, keepdims=True)
    tokens, mask = np.asarray(samples.tokens), np.asarray(samples.response_mask)
    for previous in range(4):
        for column in (1, 2):
            rows = (tokens[:, column - 1] == previous) & mask[:, column]
            if rows.sum() == 0:
                continue
            frequency = np.bincount(tokens[rows, column], minlength=4) / rows.sum()
            error = np.sqrt(probability[previous] * (1 - probability[previous]) / rows.sum())
            assert np.all(np.abs(frequency - probability[previous]) < 4.5 * error + 1e-9)
    entropy = -(probability[0] * np.log(probability[0])).sum()
    np.testing.assert_allclose(samples.entropy[:, 1], entropy, rtol=1e-5)


def test_one_compilation_serves_every_temperature_and_key():
    run_small()
    before = run._cache_size()
    run_small(temperature=jnp.float32(0.7))
    run_small(temperature=jnp.float32(1.3), seed=4)
    assert run._cache_size() == before


# Samplers.

ENTROPY = combine(entropy=entropy_temperature(high=1.6, low=0.7, threshold=2.05), top_p=top_p(p=0.8))


def test_the_plain_sampler_is_the_default():
    jax.tree.map(np.testing.assert_array_equal, run_small(**using(plain())), run_small())
    assert run_small().temperature is None
    jax.tree.map(np.testing.assert_array_equal, run_small(**using(top_p(p=1.0))), run_small())


def test_each_token_has_the_temperature_of_its_own_entropy():
    samples = run_small(**using(ENTROPY))
    mask = np.asarray(samples.response_mask)
    raw = features.entropy(make_logits(samples.tokens)[:, :-1])
    wanted = jnp.pad(jnp.where(raw >= 2.05, 1.6, 0.7), ((0, 0), (1, 0)))
    np.testing.assert_array_equal(samples.temperature, np.where(mask, wanted, 1.0).astype(np.float32))
    assert set(np.asarray(samples.temperature)[mask].tolist()) == {float(np.float32(1.6)), float(np.float32(0.7))}


@pytest.mark.parametrize("greedy", [False, True])
def test_log_prob_and_entropy_are_at_the_temperature_of_the_token(greedy):
    samples = run_small(greedy=greedy, temperature=jnp.float32(1.3), **using(ENTROPY))
    log_prob, entropy = rescore(samples)
    np.testing.assert_allclose(samples.log_prob, log_prob, atol=1e-5)
    np.testing.assert_allclose(samples.entropy, entropy, atol=1e-5)


def test_barred_tokens_do_not_count_for_a_sampler():
    allowed = jnp.array([True, False, True, False, True, False, True, False, True])
    samples = run_small(vocab_mask=allowed, **using(ENTROPY))
    raw = features.entropy(make_logits(samples.tokens)[:, :-1], vocab_mask=allowed)
    mask = np.asarray(samples.response_mask)
    assert set(np.asarray(samples.tokens)[mask].tolist()) <= {0, 2, 4, 6, 8}
    assert raw.max() < 2.05 and np.all(np.asarray(samples.temperature)[mask] == np.float32(0.7))
    np.testing.assert_allclose(samples.log_prob, rescore(samples, vocab_mask=allowed)[0], atol=1e-5)


def test_order_and_padding_change_no_draw_of_a_sampler():
    samples, order, rows = run_small(**using(ENTROPY)), np.array([2, 0, 3, 1]), np.arange(12).reshape(4, 3)
    ids = jnp.asarray(rows[order].reshape(-1), jnp.int32)
    permuted = run_small(make_prompts()[order], LENGTH[order], ids, **using(ENTROPY))
    for name in ("tokens", "temperature"):
        np.testing.assert_array_equal(getattr(permuted, name), getattr(samples, name)[ids])
    wide = run_small(jnp.pad(make_prompts(), ((0, 0), (0, 3)), constant_values=1), **using(ENTROPY))
    np.testing.assert_array_equal(wide.tokens[:, :11], samples.tokens)
    np.testing.assert_array_equal(wide.temperature[:, :11], samples.temperature)
    assert np.all(np.asarray(wide.temperature)[:, 11:] == 1.0)


def chi_square(observed, probability):
    """Pearson's statistic over the entries of positive probability; all others must not occur."""
    assert not observed[probability == 0.0].any()
    expected = probability * observed.sum()
    return ((observed - expected)[probability > 0] ** 2 / expected[probability > 0]).sum()


@pytest.mark.parametrize(
    ("sampler", "temperature", "kept"),
    [
        (plain(), 1.0, 6),
        (top_k(k=3), 1.0, 3),
        (top_p(p=0.75), 1.0, 3),  # .39 + .23 + .16 are the first three, .62 is not enough
        (top_p(p=0.75), 0.5, 2),  # .63 + .23 at this temperature
        (entropy_temperature(high=0.5, low=9.0, threshold=1.0), 0.5, 6),
        (combine(low=entropy_temperature(high=9.0, low=0.5, threshold=1.7), p=top_p(p=0.75)), 0.5, 2),
        (combine(k=top_k(k=4), p=top_p(p=0.8)), 1.0, 3),  # of the first four, which hold .88, the first three
    ],
)
def test_draws_have_the_truncated_distribution(sampler, temperature, kept):
    """Pearson's chi-square of 20,000 draws at a fixed seed: 20.5 is its .999 quantile for 5 degrees of freedom."""
    table = np.tile(np.array([1.0, 0.5, 0.1, -0.5, -1.0, -1.5]), (6, 1))
    whole = np.exp(table[0] / temperature) / np.exp(table[0] / temperature).sum()
    order = np.argsort(-whole)[:kept]
    truncated = np.zeros(6)
    truncated[order] = whole[order] / whole[order].sum()
    own = temperature if sampler.temperature is None else 1.0
    samples = run_markov(markov(table), 20_000, temperature=own, max_new_tokens=1, **using(sampler))
    drawn = np.asarray(samples.tokens)[:, 1]
    assert chi_square(np.bincount(drawn, minlength=6), truncated) < 20.5
    np.testing.assert_allclose(samples.log_prob[:, 1], np.log(whole)[drawn], rtol=1e-5)  # truncation does not enter
    np.testing.assert_allclose(samples.entropy[:, 1], -(whole * np.log(whole)).sum(), rtol=1e-5)


def test_one_compilation_serves_every_setting_of_a_sampler():
    run_small(**using(e3_temperature(vocab_size=9)))
    run_small(**using(ENTROPY))
    before = run._cache_size()
    run_small(**using(e3_temperature(vocab_size=30, target=0.5, low=None)))
    run_small(**using(combine(entropy=entropy_temperature(high=1.0, low=2.0, threshold=0.1), top_p=top_p(p=0.2))))
    assert run._cache_size() == before


@pytest.mark.parametrize("options", [{"num_generations": 0}, {"max_new_tokens": 0}])
def test_bad_counts_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        run_small(row_id=jnp.zeros((0,), jnp.int32), **options)


@pytest.mark.parametrize("name", ["eos_id", "pad_id"])
def test_special_tokens_outside_the_vocabulary_are_refused(name):
    tokens = {"eos_id": EOS, "pad_id": PAD} | {name: 9}
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 9\), got 9"):
        options = {"num_generations": 1, "max_new_tokens": 2, "temperature": 1.0} | tokens
        row_id = jnp.arange(4, dtype=jnp.int32)
        sample(transformer(CONFIG), None, make_prompts(), LENGTH, row_id, jax.random.key(0), **options)


def test_a_prompts_own_budget_ends_its_rows_and_no_others():
    whole = run_small()
    budget = jnp.array([1, 6, 3, 2], jnp.int32)
    cut = run_small(budget=budget)
    limit = np.repeat(np.asarray(budget), 3)
    np.testing.assert_array_equal(cut.num_tokens, np.minimum(whole.num_tokens, limit))
    np.testing.assert_array_equal(cut.truncated, np.asarray(whole.truncated) | (np.asarray(whole.num_tokens) > limit))
    assert cut.truncated.any() and not cut.truncated.all()
    mask = np.asarray(cut.response_mask)
    np.testing.assert_array_equal(mask.sum(axis=1), cut.num_tokens)
    for name in ("tokens", "log_prob", "entropy"):
        np.testing.assert_array_equal(getattr(cut, name)[mask], getattr(whole, name)[mask])
    np.testing.assert_array_equal(run_small(budget=jnp.full(4, 6, jnp.int32)).tokens, whole.tokens)
