"""What is stored of a skipped batch, that it comes back as it was, and the rule that stops a run."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy.train import quarantine
from jentropy.train.quarantine import SKIPPED, Batch, NumericError, Quarantine, QuarantineError, load_batch

IDS = np.array([7, 2**40, 3])


def batch(**changes) -> Batch:
    rng = np.random.default_rng(0)
    mask = np.arange(5)[None, :] < np.array([[2], [5], [3], [0], [1], [4]])
    rows = toy.rollouts(
        mask,
        logp_old=rng.normal(size=mask.shape).astype(np.float32),
        rewards=rng.normal(size=(6, 2)).astype(np.float32),
        row_id=10 + np.arange(6),
        token_data={"temperature": np.ones(mask.shape, np.float32)},
        row_data={"truncated": mask[:, 0], "half": jnp.arange(6, dtype=jnp.bfloat16)},
    )
    return Batch(rows.replace(**changes), IDS)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_batch_comes_back_bit_by_bit(tmp_path):
    poisoned = batch(logp_sampler=jnp.full((6, 5), jnp.nan).at[0, 0].set(-0.0))
    quarantine.save_batch(tmp_path, poisoned, {"step": 12, "stage": "before"})
    assert files(tmp_path) == ["step-00000012.json", "step-00000012.npz"]
    found, description = load_batch(tmp_path, 12)
    np.testing.assert_array_equal(found.example_id, IDS)
    assert jax.tree.structure(found.rollouts) == jax.tree.structure(poisoned.rollouts)
    for one, other in zip(jax.tree.leaves(found.rollouts), jax.tree.leaves(poisoned.rollouts)):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.tobytes() == np.asarray(other).tobytes()
    assert description["stage"] == "before" and description["row_id"] == list(range(10, 16))


def test_equal_batches_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        quarantine.save_batch(tmp_path / name, batch(), {"step": 1})
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_no_pickle_is_written_or_read(tmp_path):
    quarantine.save_batch(tmp_path, batch(), {"step": 1})
    with np.load(tmp_path / "step-00000001.npz", allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored)
    np.savez(tmp_path / "step-00000001.npz", tokens=np.array([{}], object))
    description = json.loads((tmp_path / "step-00000001.json").read_bytes())
    digest = hashlib.sha256((tmp_path / "step-00000001.npz").read_bytes()).hexdigest()
    (tmp_path / "step-00000001.json").write_text(json.dumps({**description, "sha256": digest}))
    with pytest.raises(QuarantineError, match="damaged"):
        load_batch(tmp_path, 1)


def test_what_is_not_finite_is_named():
    rows = batch().rollouts
    assert quarantine.non_finite_rows(rows) == {}
    outside = rows.replace(logp_sampler=rows.logp_sampler.at[0, 3].set(jnp.nan))
    assert quarantine.non_finite_rows(outside) == {}
    rewards = rows.rewards.at[2, 1].set(jnp.inf).at[3, 0].set(jnp.nan)
    bad = rows.replace(logp_sampler=rows.logp_sampler.at[1, 4].set(jnp.nan), rewards=rewards)
    assert quarantine.non_finite_rows(bad) == {"logp_sampler": [11], "rewards": [12, 13]}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "step-00000003.npz"), r"npz is damaged: its checksum is not the one in step-"),
        (lambda folder: (folder / "step-00000003.npz").unlink(), r"npz is missing"),
        (lambda folder: (folder / "step-00000003.json").write_text('{"step": 3'), r"json is damaged"),
        (lambda folder: (folder / "step-00000003.json").write_text("[]"), r"json is damaged: it does not describe"),
        (lambda folder: (folder / "step-00000003.json").write_text('{"step": 4}'), r"it does not describe step 3"),
        (lambda folder: (folder / "step-00000003.json").unlink(), r"no batch of step 3; stored: \[5\]"),
    ],
)
def test_damage_is_an_error_that_names_the_file(tmp_path, damage, message):
    for step in (3, 5):
        quarantine.save_batch(tmp_path, batch(), {"step": step})
    damage(tmp_path)
    with pytest.raises(QuarantineError, match=message):
        load_batch(tmp_path, 3)
    assert QuarantineError.exit_code == 65


def test_a_write_that_fails_leaves_the_batch_that_was_there(tmp_path, monkeypatch):
    quarantine.save_batch(tmp_path, batch(), {"step": 3})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quarantine.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        quarantine.save_batch(tmp_path, batch(rewards=jnp.ones((6, 2))), {"step": 3})
    np.testing.assert_array_equal(load_batch(tmp_path, 3)[0].rollouts.rewards, batch().rollouts.rewards)


def observe(rule, skipped):
    """Shows the rule one rollout after the other; returns the steps that were stored."""
    return [step for step, share in enumerate(skipped) if rule.observe(step, "rl", {SKIPPED: share}, batch())]


def test_skipped_rollouts_are_stored_and_others_are_not(tmp_path):
    rule = Quarantine(tmp_path / "quarantine", seed=5)
    assert not (tmp_path / "quarantine").exists()
    assert observe(rule, [0.0, 0.25, 0.0, 1.0]) == [1, 3]
    assert quarantine.stored_steps(tmp_path / "quarantine") == [1, 3]
    description = quarantine.read_description(tmp_path / "quarantine", 1)
    assert (description["seed"], description["stage"], description[SKIPPED]) == (5, "rl", 0.25)
    assert description["example_id"] == IDS.tolist()


def test_three_in_a_row_go_on_and_four_stop(tmp_path):
    rule = Quarantine(tmp_path, seed=0)
    assert observe(rule, [1.0, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 0.0]) == [0, 1, 2, 4, 5, 6]
    with pytest.raises(NumericError, match=r"the last 4 rollouts, up to step 4, .*; 3 in a row are allowed"):
        observe(rule, [0.0, 1.0, 1.0, 1.0, 0.25])
    assert quarantine.stored_steps(tmp_path)[-1] == 6 and 4 in quarantine.stored_steps(tmp_path)
    assert NumericError.exit_code == 70


def test_a_resumed_run_goes_on_counting(tmp_path):
    lines = [
        *({"step": step, SKIPPED: share} for step, share in enumerate((1.0, 0.0, 1.0))),
        {"step": 3, "val/entropy": 1.0},
        {"step": 3, SKIPPED: 0.5},
    ]
    assert quarantine.trailing_skips(lines) == 2
    assert quarantine.trailing_skips(lines[:2]) == quarantine.trailing_skips([]) == 0
    rule = Quarantine(tmp_path, seed=0, in_a_row=2)
    with pytest.raises(NumericError):
        observe(rule, [1.0, 1.0])


def test_the_newest_batches_are_kept(tmp_path):
    assert len(observe(Quarantine(tmp_path, seed=0, max_kept=2, limit=9), [1.0] * 5)) == 5
    assert files(tmp_path) == [f"step-0000000{step}.{kind}" for step in (3, 4) for kind in ("json", "npz")]


@pytest.mark.parametrize(("name", "value"), [("limit", -1), ("max_kept", 0)])
def test_settings_out_of_range(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least {value + 1}, got {value}"):
        Quarantine(tmp_path, seed=0, **{name: value})
