"""Seed-GRPO's factor: entropies of clusters against an explicit loop, its forms, and who takes part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy.base import initial_plan
from jentropy.mechanisms.semantic_entropy import semantic_entropy

GROUP = np.array([4, 4, 4, 4, 1, 1, 1, 0, 2, 2, 2, 2], np.int32)
ANSWER = np.array([7, 7, 3, -1, 5, 5, 5, 9, -1, -2, -1, 8], np.int32)
LENGTH = np.array([3, 1, 2, 4, 2, 2, 1, 3, 1, 2, 3, 4])
ROW_ID = np.array([5, 2, 9, 0, 1, 3, 4, 6, 11, 8, 7, 10], np.int32)


def example(answer=ANSWER, scale=1.0, fill=np.nan, **row_data):
    """Groups of 4, 3, 1 and 4 rows, with answers that agree in part, in all, alone, and mostly not parsed."""
    rng = np.random.default_rng(0)
    mask = np.arange(5)[None, :] < LENGTH[:, None]
    old = np.where(mask, -scale * rng.exponential(size=mask.shape), fill)
    if answer is not None:
        row_data["answer_id"] = answer
    batch = toy.rollouts(mask, logp_old=old, group=GROUP, row_id=ROW_ID, row_data=row_data)
    advantage = jnp.asarray(rng.normal(size=mask.shape))
    return batch, toy.signals(batch, log_prob=batch.logp_old), jnp.where(mask, advantage, 0.0)


def probabilities(rows, answer, old, mask, estimator, unparsed, normalised):
    """Of the clusters among these rows."""
    names = [f"own {b}" if answer[b] < 0 and unparsed == "own" else str(max(answer[b], -1)) for b in rows]
    score = np.array([old[b][mask[b]].mean() if normalised else old[b][mask[b]].sum() for b in rows], np.float64)
    weight = np.exp(score - score.max()) if estimator != "discrete" else np.ones(len(rows))
    return [sum(w for n, w in zip(names, weight) if n == name) / weight.sum() for name in dict.fromkeys(names)]


def factors_by_loop(batch, estimator, form, unparsed, normalised, alpha=0.5, gamma=2.0):
    mask, old, answer = (np.asarray(x) for x in (batch.loss_mask, batch.logp_old, batch.row_data["answer_id"]))
    valid = np.asarray(batch.row_data.get("is_valid", np.ones(len(mask), bool))) & mask.any(axis=1)
    factor, entropies = np.ones(len(mask)), []
    for group in np.unique(np.asarray(batch.group)[valid]):
        rows = [b for b in range(len(mask)) if valid[b] and batch.group[b] == group]
        p = probabilities(rows, answer, old, mask, estimator, unparsed, normalised)
        entropy = -sum(np.log(p)) / len(p) if estimator == "mc" else -sum(x * np.log(x) for x in p)
        entropies.append(min(entropy, np.log(len(rows))))
        x = alpha * entropies[-1] / np.log(len(rows)) if len(rows) > 1 else 0.0
        factor[rows] = {"linear": 1 - x, "exponential": np.exp(-x), "focal": (1 - x) ** gamma}[form]
    return factor, entropies


@pytest.mark.parametrize(
    ("estimator", "form", "unparsed", "normalised"),
    [
        ("discrete", "linear", "own", False),
        ("discrete", "exponential", "shared", False),
        ("shannon", "linear", "shared", True),
        ("shannon", "focal", "own", False),
        ("mc", "exponential", "own", True),
        ("mc", "linear", "shared", False),
    ],
)
def test_against_a_loop(estimator, form, unparsed, normalised):
    mechanism = semantic_entropy(estimator=estimator, form=form, unparsed=unparsed, length_normalised=normalised)
    for valid in (np.ones(12, bool), np.arange(12) % 5 != 2):
        batch, signals, advantage = example(is_valid=valid)
        plan = toy.update(mechanism, signals, advantage)
        factor, entropies = factors_by_loop(batch, estimator, form, unparsed, normalised)
        np.testing.assert_allclose(plan.advantage, advantage * factor[:, None], rtol=5e-6)
        total, count = plan.metrics["semantic_entropy/entropy"]
        assert count == len(entropies)
        np.testing.assert_allclose(total, sum(entropies), rtol=5e-6)


@pytest.mark.parametrize("estimator", ["discrete", "shannon", "mc"])
def test_in_double_precision(estimator):
    with jax.enable_x64(True):
        batch, signals, advantage = example(scale=30.0)
        plan = toy.update(semantic_entropy(estimator=estimator, unparsed="shared"), signals, advantage)
        factor, _ = factors_by_loop(batch, estimator, "linear", "shared", False)
        np.testing.assert_allclose(plan.advantage, advantage * factor[:, None], rtol=1e-12)


def test_by_hand():
    _, signals, advantage = example()
    plan = toy.update(semantic_entropy(semantic_entropy_alpha=1.0), signals, advantage)
    factor = np.asarray(plan.advantage)[:, 0] / np.asarray(advantage)[:, 0]
    half = 0.5 * np.log(2) / np.log(4) + 0.5  # clusters of 2, 1, 1 rows of 4: entropy 1.5 log 2
    np.testing.assert_allclose(factor[:4], 1 - half, rtol=1e-6)
    np.testing.assert_array_equal(factor[4:8], 1.0)  # one answer; one row
    np.testing.assert_allclose(factor[8:], 0.0, atol=1e-6)  # four different ones
    assert plan.metrics["semantic_entropy/factor"][1] == 4.0


@pytest.mark.parametrize("estimator", ["discrete", "shannon", "mc"])
@pytest.mark.parametrize("form", ["linear", "exponential", "focal"])
def test_one_cluster_keeps_the_advantage_exactly(estimator, form):
    _, signals, advantage = example(answer=np.full(12, -3, np.int32), scale=100.0)
    plan = toy.update(semantic_entropy(estimator=estimator, form=form, unparsed="shared"), signals, advantage)
    np.testing.assert_array_equal(plan.advantage, advantage)


def test_unlikely_clusters_are_bounded():
    # The mean of -log p_k over clusters grows without bound as one of them becomes certain; the entropy falls to 0.
    _, signals, advantage = example(answer=np.arange(12, dtype=np.int32), scale=1e3)
    bounded = toy.update(semantic_entropy(estimator="mc", semantic_entropy_alpha=1.0), signals, advantage)
    np.testing.assert_array_equal(bounded.advantage[GROUP != 0], 0.0)
    certain = toy.update(semantic_entropy(estimator="shannon", semantic_entropy_alpha=1.0), signals, advantage)
    np.testing.assert_allclose(certain.advantage, advantage, rtol=1e-5)


def test_equal_ids_of_other_groups_are_other_answers():
    batch, signals, advantage = example(answer=np.array([1, 1, 1, 2, 1, 1, 1, 1, 2, 2, 2, 2], np.int32))
    plan = toy.update(semantic_entropy(), signals, advantage)
    changed = np.any(np.asarray(plan.advantage != advantage), axis=1)
    np.testing.assert_array_equal(changed, np.asarray(batch.group) == 4)


def test_rows_without_tokens_do_not_take_part():
    batch, signals, advantage = example()
    without = batch.replace(loss_mask=batch.loss_mask.at[2].set(False).at[3].set(False))
    plan = toy.update(semantic_entropy(estimator="shannon"), signals.replace(batch=without), advantage)
    np.testing.assert_array_equal(plan.advantage[:2], advantage[:2])  # the two that agree are left
    empty = batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask))
    plan = toy.update(semantic_entropy(estimator="mc"), signals.replace(batch=empty), advantage)
    assert not np.any(plan.advantage) and plan.metrics["semantic_entropy/entropy"] == (0.0, 0.0)


def test_order_of_rows_does_not_matter():
    order = np.random.default_rng(1).permutation(12)
    batch, signals, advantage = example()
    mechanism = semantic_entropy(estimator="mc")
    moved = jax.tree.map(lambda x: x[order], (batch, dict(signals.scores)))
    found = toy.update(mechanism, toy.signals(moved[0], **moved[1]), advantage[order])
    wanted = toy.update(mechanism, signals, advantage)
    np.testing.assert_allclose(found.advantage, wanted.advantage[order], rtol=1e-6)


def test_garbage_outside_the_mask_does_not_matter():
    for estimator in ("discrete", "shannon", "mc"):
        clean, dirty = (
            toy.update(semantic_entropy(estimator=estimator), *example(fill=fill)[1:]) for fill in (0.0, np.nan)
        )
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("form", ["linear", "exponential", "focal"])
def test_alpha_0_is_the_identity(form):
    batch, signals, advantage = example()
    plan = toy.update(semantic_entropy(semantic_entropy_alpha=0.0, form=form), signals, advantage)
    jax.tree.map(np.testing.assert_array_equal, plan.replace(metrics={}), initial_plan(batch, advantage))


def test_the_answers_must_be_there():
    _, signals, advantage = example(answer=None, is_valid=np.ones(12, bool))
    assert semantic_entropy().requires == ("answer_id",)
    with pytest.raises(ValueError, match=r"semantic_entropy needs row_data\['answer_id'\], got \['is_valid'\]"):
        toy.update(semantic_entropy(), signals, advantage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"semantic_entropy_alpha": -0.1}, r"semantic_entropy_alpha must be in \[0, 1\], finite, got -0\.1"),
        ({"semantic_entropy_alpha": 1.5}, r"semantic_entropy_alpha must be in \[0, 1\], finite, got 1\.5"),
        (
            {"semantic_entropy_alpha": float("inf"), "form": "exponential"},
            r"semantic_entropy_alpha must be in \[0, inf\], finite, got inf",
        ),
        ({"form": "square"}, r"form must be one of \['linear', 'exponential', 'focal'\], got 'square'"),
        ({"estimator": "kuhn"}, r"estimator must be one of \['discrete', 'shannon', 'mc'\], got 'kuhn'"),
        ({"unparsed": "drop"}, "unparsed must be own or shared, got 'drop'"),
        ({"focal_gamma": 0.0}, r"focal_gamma must be finite and above 0, got 0\.0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        semantic_entropy(**options)
    assert semantic_entropy(semantic_entropy_alpha=3.0, form="exponential").requires == ("answer_id",)
