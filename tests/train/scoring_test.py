"""The forward pass: every output against plain logits, only what is asked for, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import rollouts

from jentropy import features
from jentropy.base import ENTROPY, LOG_PROB, Output
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.train.scoring import make_scorer

POLICY = transformer(
    TransformerConfig(vocab_size=16, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_size=8, mlp_width=24)
)
NUCLEI = tuple(Output(name, p) for name in ("nucleus_entropy", "nucleus_entropy_released") for p in (0.5, 0.8))


def batch(temperature=None):
    rng = np.random.default_rng(0)
    mask = rng.random((4, 7)) < 0.6
    mask[:, 0] = False
    data = {} if temperature is None else {"temperature": np.full(mask.shape, temperature, np.float32)}
    rows = rollouts(mask, token_data=data)
    return rows.replace(tokens=jnp.asarray(rng.integers(0, 16, mask.shape), jnp.int32))


@pytest.mark.parametrize("row_temperature", [None, 0.4])
def test_nucleus_entropies_are_those_of_the_logits(row_temperature):
    rows, params = batch(row_temperature), jax.jit(POLICY.init)(jax.random.key(0))
    scorer = make_scorer(POLICY, (LOG_PROB, *NUCLEI), 0.8)

    def plain(params):
        logits = POLICY.hidden(params, rows.tokens)[:, :-1] @ POLICY.unembed(params).T
        found = {}
        for output in NUCLEI:
            entropy = getattr(features, output.name)(logits, output.argument, temperature=row_temperature or 0.8)
            found[str(output)] = jnp.where(rows.loss_mask, jnp.pad(entropy, ((0, 0), (1, 0))), 0.0)
        return found

    def evaluate(function):
        scores, vjp = jax.vjp(function, params)
        return scores, vjp({name: jnp.cos(score) for name, score in scores.items()})[0]

    names = [str(output) for output in NUCLEI]
    pick = lambda scores: {name: scores[name] for name in names}  # noqa: E731
    scores, gradient = jax.jit(lambda: evaluate(lambda p: pick(scorer(p, {}, rows))))()
    expected, expected_gradient = jax.jit(lambda: evaluate(plain))()
    assert names[0] == "nucleus_entropy(0.5)" and len({round(float(jnp.sum(x)), 2) for x in scores.values()}) == 4
    for name in names:
        np.testing.assert_allclose(scores[name], expected[name], atol=2e-5)
        assert not np.any(np.asarray(scores[name])[~np.asarray(rows.loss_mask)])
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient)):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(np.abs(b).max())))


def test_only_what_is_asked_for_is_computed():
    params = jax.eval_shape(POLICY.init, jax.random.key(0))

    def program(*outputs):
        scorer = make_scorer(POLICY, (LOG_PROB, ENTROPY, *outputs), 1.0)
        scores = jax.eval_shape(scorer, params, {}, batch())
        assert set(scores) == {"log_prob", "entropy", *map(str, outputs)}
        return str(jax.make_jaxpr(scorer)(params, {}, batch()))

    assert "bitcast_convert_type" not in program()
    assert "bitcast_convert_type" in program(NUCLEI[0])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (Output("surprise"), r"no forward pass provides the output 'surprise'; known: log_prob, .*nucleus_entropy"),
        (Output("nucleus_entropy"), r"the argument of nucleus_entropy must be in \(0, 1\], got None"),
        (Output("nucleus_entropy_released", 1.5), r"nucleus_entropy_released must be in \(0, 1\], got 1\.5"),
        (Output("entropy", 0.8), r"the argument of entropy must be None, got 0\.8"),
    ],
)
def test_refusals(output, message):
    with pytest.raises(ValueError, match=message):
        make_scorer(POLICY, (LOG_PROB, output), 1.0)
