"""The ledger of whole steps: against plain logits, in parts, cut and permuted, when off, in a run's folder."""

import functools

import chex
import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_test
import tiny
from step_test import COLUMNS, POLICY, ROWS, TEMPERATURE, objective, poison, rollouts

from jentropy import features
from jentropy.base import Policy, initial_plan
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.surrogates import cispo, dual_clip, gspo, ratio, reinforce
from jentropy.train import ledger, loop, step
from jentropy.train.ledger import Ledger
from jentropy.train.metrics import MetricsWriter, divide, read_metrics
from jentropy.train.optimizer import AdamW

EVERY_STEP = Ledger(first_order_every=1)
SEVERAL = (("num_minibatches", 2), ("num_epochs", 2))
IN_PARTS = (*SEVERAL, ("num_microbatches", 4))
WHOLE = {"entropy_before", "entropy_change", "lemma1", "first_order", "covariance", "response_covariance"}
VALUES = {"entropy_change", "lemma1", "covariance"}


def method(**options):
    """Clip range .02, KL-Cov on .3 of the tokens, an entropy bonus."""
    return objective(penalty=0.1, **options)


@functools.cache
def stepped(cuts: tuple[tuple[str, int], ...] = (), settings: Ledger | None = EVERY_STEP):
    """The state after one step, and its metrics as `(sum, count)`."""
    return step_test.run(method(), rollouts(), ledger=settings, **dict(cuts))


def entry(metrics):
    """What the ledger says, divided, without its prefix."""
    return {k.removeprefix(ledger.PREFIX): v for k, v in divide(metrics).items() if k.startswith(ledger.PREFIX)}


def parts(found):
    """`{partition: {part: {quantity: value}}}`."""
    tree: dict[str, dict[str, dict[str, float]]] = {}
    for name, value in found.items():
        if name.count("/"):
            partition, part, quantity = name.split("/")
            tree.setdefault(partition, {}).setdefault(part, {})[quantity] = value
    return tree


def assert_same(found, wanted, **tolerance):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **tolerance)


_record = jax.jit(ledger.record, static_argnums=(0, 1, 2, 3))


def recorded(batch, settings=EVERY_STEP, step_number=0, num=1):
    """The entry of a rollout for parameters that are moved by hand, without a step."""
    before = step_test.params()
    after = jax.tree.map(lambda x: x * 1.01, before)
    angle = jnp.arange(COLUMNS, dtype=jnp.float32)[None, :] + batch.row_id[:, None].astype(jnp.float32)
    advantage = jnp.where(batch.loss_mask, jnp.sin(angle), jnp.nan)
    logp = jnp.where(batch.loss_mask, -jnp.abs(jnp.cos(1.0 + 3.0 * advantage)), jnp.nan)
    marks = {"clipped": advantage > 0.5, "mechanism.a": batch.loss_mask & (batch.tokens > 7)}
    seen = ledger.Seen(batch.replace(logp_old=logp), advantage, marks)
    return entry(_record(settings, POLICY, TEMPERATURE, num, before, after, jnp.int32(step_number), seen))


# Against plain logits.


def _logits(params, tokens):
    return jnp.einsum("btd,vd->btv", POLICY.hidden(params, tokens)[:, :-1], POLICY.unembed(params))


@pytest.mark.parametrize("cuts", [pytest.param((), marks=pytest.mark.slow), SEVERAL, IN_PARTS])
def test_measured_change_and_lemma_1_are_those_of_plain_logits(cuts):
    after, metrics = stepped(cuts)
    mask = np.asarray(rollouts().loss_mask[:, 1:])
    z0, z1 = (jax.jit(_logits)(p, rollouts().tokens) for p in (step_test.params(), after.params))
    h0, h1 = (np.asarray(features.entropy(z, temperature=TEMPERATURE)) for z in (z0, z1))
    log_prob = np.asarray(jax.nn.log_softmax(z0 / TEMPERATURE), np.float64)
    change = (np.asarray(z1, np.float64) - np.asarray(z0, np.float64)) / TEMPERATURE
    weight = np.exp(log_prob)
    centred = change - (weight * change).sum(-1, keepdims=True)
    lemma = -(weight * log_prob * centred).sum(-1)
    found = entry(metrics)
    np.testing.assert_allclose(found["entropy_before"], h0[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(found["entropy_change"], (h1 - h0)[mask].mean(), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found["lemma1"], lemma[mask].mean(), rtol=1e-4, atol=1e-7)
    assert abs(found["entropy_change"]) > 1e-3
    np.testing.assert_allclose(found["covariance"], divide(metrics)["cov/mean"], rtol=1e-5)


def test_a_rows_own_temperatures_are_used():
    rng = np.random.default_rng(5)
    tau = jnp.asarray(rng.uniform(0.5, 2.0, (ROWS, COLUMNS)), jnp.float32)
    found = recorded(rollouts().replace(token_data={"temperature": tau}))
    mask, before = np.asarray(rollouts().loss_mask[:, 1:]), step_test.params()
    entropies = [
        np.asarray(features.entropy(_logits(p, rollouts().tokens) / tau[:, 1:, None], temperature=1.0))[mask].mean()
        for p in (before, jax.tree.map(lambda x: x * 1.01, before))
    ]
    np.testing.assert_allclose(found["entropy_before"], entropies[0], rtol=1e-6)
    np.testing.assert_allclose(found["entropy_change"], entropies[1] - entropies[0], rtol=1e-3, atol=1e-6)
    assert abs(found["entropy_before"] - recorded(rollouts())["entropy_before"]) > 1e-3


# First order, in float64.


def _recurrent() -> Policy:
    """A policy of any precision: a mean of embeddings so far, one hidden layer."""

    def hidden(params, tokens):
        x = jnp.cumsum(params["embedding"][tokens], axis=1)
        count = jnp.arange(1, tokens.shape[1] + 1, dtype=x.dtype)
        return jnp.tanh((x / count[None, :, None]) @ params["inner"])

    return POLICY._replace(hidden=hidden, unembed=lambda params: params["head"])


@pytest.mark.parametrize(("seed", "num_microbatches"), [(0, 1), (1, 2)])
def test_first_order_is_a_finite_difference(seed, num_microbatches):
    with jax.enable_x64(True):
        policy, batch = _recurrent(), rollouts(seed)
        batch = batch.replace(logp_old=jnp.zeros(batch.tokens.shape), rewards=batch.rewards.astype(jnp.float64))
        rng = np.random.default_rng(seed)
        shapes = {"embedding": (16, 6), "inner": (6, 8), "head": (16, 8)}
        before = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        tangent = {name: jnp.asarray(0.01 * rng.normal(size=shape)) for name, shape in shapes.items()}

        def moved(epsilon):
            return jax.tree.map(lambda x, dx: x + epsilon * dx, before, tangent)

        def entropy(epsilon):
            params = moved(epsilon)
            z = jnp.einsum("btd,vd->btv", policy.hidden(params, batch.tokens)[:, :-1], params["head"])
            return jnp.mean(features.entropy(z, temperature=TEMPERATURE), where=batch.loss_mask[:, 1:])

        h = 1e-4
        wanted, measured = float((entropy(h) - entropy(-h)) / (2 * h)), float(entropy(1.0) - entropy(0.0))
        advantage = jnp.where(batch.loss_mask, 1.0, jnp.nan)
        seen = ledger.Seen(batch, advantage, {"clipped": jnp.zeros_like(batch.loss_mask)})
        found = divide(
            ledger.record(
                EVERY_STEP, policy, TEMPERATURE, num_microbatches, before, moved(1.0), jnp.int32(3), seen
            )
        )  # fmt: skip
    np.testing.assert_allclose(found["ledger/first_order"], wanted, rtol=1e-7)
    np.testing.assert_allclose(found["ledger/entropy_change"], measured, rtol=1e-9)
    assert abs(found["ledger/entropy_change"] / wanted - 1.0) > 1e-4


# Parts.


@pytest.mark.parametrize("cuts", [(), SEVERAL, IN_PARTS])
def test_parts_add_up_to_the_whole(cuts):
    found = entry(stepped(cuts)[1])
    tree = parts(found)
    mechanisms = {f"mechanism.{name}" for name in ("poison", "clip_range", "kl_cov", "entropy_bonus")}
    assert set(tree) == {"difficulty", "advantage", "clipped", "covariance_rank", *mechanisms}
    assert {name for name in found if "/" not in name} == WHOLE
    for partition in tree.values():
        assert all(set(part) == VALUES | {"fraction"} for part in partition.values())
        np.testing.assert_allclose(sum(part["fraction"] for part in partition.values()), 1.0, atol=1e-6)
        for quantity in VALUES:
            total = sum(part[quantity] for part in partition.values())
            np.testing.assert_allclose(total, found[quantity], atol=1e-6, rtol=1e-6)


def test_the_sign_is_that_of_the_estimators_advantage():
    found = parts(entry(stepped()[1]))["advantage"]
    reward, group = np.asarray(rollouts().rewards)[:, 0], np.asarray(rollouts().group)
    centred = reward - np.array([reward[group == g].mean() for g in group])
    tokens = np.asarray(rollouts().loss_mask).sum(axis=1)
    wanted = {"negative": tokens[centred < 0].sum(), "zero": 0, "positive": tokens[centred > 0].sum()}
    for name, count in wanted.items():
        np.testing.assert_allclose(found[name]["fraction"], count / tokens.sum(), rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_difficulty_is_the_accuracy_of_the_group(seed):
    rng = np.random.default_rng(seed)
    reward = (rng.random(ROWS) < np.repeat([0.0, 0.3, 0.7, 1.0], ROWS // 4)).astype(np.float32)
    order = np.argsort(np.asarray(rollouts().group), kind="stable")
    rewards = np.zeros((ROWS, 1), np.float32)
    rewards[order, 0] = reward
    _, metrics = step_test.run(method(), rollouts().replace(rewards=jnp.asarray(rewards)), ledger=EVERY_STEP)
    tokens = np.asarray(rollouts().loss_mask).sum(axis=1)[order].reshape(4, -1).sum(axis=1)
    names = {0.0: "0", 0.25: "0.25", 0.5: "0.5", 0.75: "0.75", 1.0: "1"}
    wanted = dict.fromkeys([*names.values(), "1-"], 0.0)
    for accuracy, count in zip(reward.reshape(4, -1).mean(axis=1), tokens):
        wanted[names[float(accuracy)]] += count / tokens.sum()
    found = {name: part["fraction"] for name, part in parts(entry(metrics))["difficulty"].items()}
    assert_same(found, wanted, rtol=1e-6)
    assert len([x for x in wanted.values() if x]) >= 3


# What happened to the tokens.


def _bounded(batch, seed=0):
    """A plan with bounds on some tokens, and scores away from `logp_old`."""
    rng = np.random.default_rng(seed)
    old = jnp.asarray(-rng.exponential(size=(ROWS, COLUMNS)), jnp.float32)
    batch = batch.replace(logp_old=old)
    plan = initial_plan(batch, jnp.asarray(rng.normal(size=old.shape) * (rng.random(old.shape) < 0.9), jnp.float32))
    bounded = jnp.asarray(rng.random(old.shape) < 0.8)
    plan = plan.replace(
        ratio_low=jnp.where(bounded, 0.8, 0.0),
        ratio_high=jnp.where(bounded, 1.2, jnp.inf),
        pg_weight=plan.pg_weight * jnp.asarray(rng.random(old.shape) < 0.9, jnp.float32),
    )
    return batch, plan, {"log_prob": old + jnp.asarray(0.3 * rng.normal(size=old.shape), jnp.float32)}


def _clipped(surrogate, ok=True):
    batch, plan, scores = _bounded(rollouts())
    marks = ledger.update_marks(surrogate, scores, plan, batch, {"a": batch.loss_mask}, jnp.bool_(ok))
    assert set(marks) == {"clipped", "mechanism.a"}
    return np.asarray(marks["clipped"]), surrogate(scores, plan, batch)[1], np.asarray(marks["mechanism.a"])


def test_clipped_is_outside_the_bounds_where_there_is_no_gradient():
    batch, plan, scores = _bounded(rollouts())
    r = np.exp(np.asarray(scores["log_prob"] - batch.logp_old))
    wanted = (np.asarray(plan.advantage) < 0) & (r < plan.ratio_low)
    wanted |= (np.asarray(plan.advantage) > 0) & (r > plan.ratio_high)
    wanted &= np.asarray(batch.loss_mask) & (np.asarray(plan.pg_weight) != 0)
    found, metrics, _ = _clipped(ratio)
    np.testing.assert_array_equal(found, wanted)
    clipped, used = metrics["actor/pg_clipfrac"]
    assert 0 < found.sum() == int(clipped) < int(used)


def test_every_surrogate_says_itself_where_it_stops_the_gradient():
    for surrogate in (reinforce, cispo()):
        assert not _clipped(surrogate)[0].any()
    assert _clipped(cispo())[1]["actor/pg_clipfrac"][0] > 0.0
    dual, plain = _clipped(dual_clip(clip_ratio_c=1.5))[0], _clipped(ratio)[0]
    assert np.all(dual[plain]) and dual.sum() > plain.sum()
    rows = np.asarray(rollouts().loss_mask).any(axis=1)
    assert 0 < _clipped(gspo())[0].any(axis=1).sum() <= rows.sum()


def test_a_skipped_update_leaves_no_mark():
    clipped, _, touched = _clipped(ratio, ok=False)
    assert not clipped.any() and not touched.any()


def test_marks_of_several_updates_are_a_union_on_the_rows_they_came_from():
    rng = np.random.default_rng(7)
    indices = np.concatenate([rng.permutation(12).reshape(3, 4) for _ in range(2)])
    marks = {name: rng.random((6, 4, 5)) < 0.3 for name in ("clipped", "mechanism.a")}
    found = ledger.merge_marks(jax.tree.map(jnp.asarray, marks), jnp.asarray(indices), 12)
    for name, mark in marks.items():
        wanted = np.zeros((12, 5), bool)
        for update, rows in zip(mark, indices):
            for marked, row in zip(update, rows):
                wanted[row] |= marked
        np.testing.assert_array_equal(found[name], wanted)


def test_marks_of_a_step_are_those_of_its_updates():
    """With one epoch each token is in one update: shares of tokens are what mechanism and surrogate report."""
    _, metrics = stepped((("num_minibatches", 4),), Ledger())
    tree, number = parts(entry(metrics)), int(np.asarray(rollouts().loss_mask).sum())
    (clipped, _), (selected, count) = metrics["actor/pg_clipfrac"], metrics["kl_cov/selected_fraction"]
    assert count == number and 0 < clipped < number and 0 < selected < number
    found = {name: part.get("touched", part.get("yes"))["fraction"] for name, part in tree.items() if len(part) == 2}
    wanted = {"clip_range": 1.0, "entropy_bonus": 1.0, "poison": 0.0, "kl_cov": selected / number}
    assert_same(found, {"clipped": clipped / number} | {f"mechanism.{k}": v for k, v in wanted.items()}, rtol=1e-6)


def test_a_step_without_an_update_changes_nothing():
    bad = objective(penalty=0.1, bad=poison(0, np.nan))
    found = entry(step_test.run(bad, rollouts(), ledger=EVERY_STEP)[1])
    for name in ("entropy_change", "lemma1", "first_order"):
        assert found[name] == 0.0
    assert found["entropy_before"] > 1.0 and found["covariance"] != 0.0
    for name, partition in parts(found).items():
        if name.startswith("mechanism."):
            assert partition["touched"]["fraction"] == 0.0, "the plan came to nothing"


def test_of_several_updates_only_the_skipped_one_leaves_no_mark():
    bad = objective(penalty=0.1, bad=poison(0, np.nan))
    tree = parts(entry(step_test.run(bad, rollouts(), ledger=EVERY_STEP, **dict(SEVERAL))[1]))
    assert tree["mechanism.poison"]["touched"]["fraction"] == 0.0
    assert tree["mechanism.clip_range"]["touched"]["fraction"] == 1.0
    assert abs(tree["mechanism.clip_range"]["touched"]["entropy_change"]) > 1e-4


# Cuts, order, padding, what is outside the mask.


def test_micro_batches_change_nothing():
    assert_same(entry(stepped(IN_PARTS)[1]), entry(stepped(SEVERAL)[1]), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("cuts", [(), IN_PARTS])
def test_the_order_of_rows_changes_nothing(cuts):
    """The minibatches are the same, since groups keep their numbers."""
    order = np.random.default_rng(4).permutation(ROWS)
    permuted = jax.tree.map(lambda x: x[order], rollouts())
    found = entry(step_test.run(method(), permuted, ledger=EVERY_STEP, **dict(cuts))[1])
    assert_same(found, entry(stepped(cuts)[1]), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("num", [1, 2])
def test_rows_that_pad_a_rollout_change_nothing(num):
    """A group without a token, as dynamic sampling pads."""
    batch = rollouts()
    extra = jax.tree.map(lambda x: x[:4], batch)
    extra = extra.replace(
        loss_mask=jnp.zeros_like(extra.loss_mask), row_id=extra.row_id + ROWS, group=jnp.full(4, 4, jnp.int32),
        rewards=jnp.full((4, 1), jnp.nan),
    )  # fmt: skip
    padded = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), batch, extra)
    valid = jnp.concatenate([jnp.ones(ROWS, bool), jnp.zeros(4, bool)])
    found = recorded(padded.replace(row_data={"is_valid": valid}), num=num)
    assert_same(found, recorded(batch), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fill", [np.nan, np.inf])
def test_what_is_outside_the_mask_has_no_influence(fill):
    """`recorded` has NaN outside the mask already, in advantage and log-probability."""
    batch, mask = rollouts(), rollouts().loss_mask
    after = jnp.cumsum(mask[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1] == 0
    other = batch.replace(logp_sampler=jnp.where(mask, 0.0, fill), tokens=jnp.where(after, 5, batch.tokens))
    found = recorded(other)
    assert found == recorded(batch) and np.isfinite(list(found.values())).all()


def test_a_rollout_without_a_token_has_no_entry():
    assert recorded(rollouts().replace(loss_mask=jnp.zeros_like(rollouts().loss_mask))) == {}


def test_no_array_over_the_vocabulary():
    """At V = 49152 one array of logits would take 403 MB."""
    vocab, rows, columns = 49152, 32, 64
    config = TransformerConfig(
        vocab_size=vocab, width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=8, mlp_width=8
    )  # fmt: skip
    policy = transformer(config)

    def widen(x):
        return jax.ShapeDtypeStruct((rows, *(columns if n == COLUMNS else n for n in x.shape[1:])), x.dtype)

    mark = jax.ShapeDtypeStruct((rows, columns), bool)
    advantage = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    seen = ledger.Seen(jax.tree.map(widen, rollouts()), advantage, {"clipped": mark})
    params = jax.eval_shape(policy.init, jax.random.key(0))
    lowered = _record.lower(EVERY_STEP, policy, 1.0, 1, params, params, jax.ShapeDtypeStruct((), jnp.int32), seen)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < rows * columns * vocab * 4 / 4


# When.


def test_entries_are_made_when_they_are_due():
    found = [recorded(rollouts(), Ledger(every=2, first_order_every=4), step_number) for step_number in range(5)]
    assert ["entropy_change" in line for line in found] == [True, False, True, False, True]
    assert ["first_order" in line for line in found] == [True, False, False, False, True]
    assert not found[1] and not found[3]
    assert_same(found[0], recorded(rollouts()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"first_order_every": 0}, "first_order_every must be a positive multiple of every = 1, got 0"),
        ({"every": 4}, "first_order_every must be a positive multiple of every = 4, got 10"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Ledger(**arguments)


# Off and on.


def test_off_a_step_is_the_program_of_one_that_never_heard_of_it(monkeypatch):
    def program():
        step.make_train_step.cache_clear()
        made = step_test.step_of(method(), **dict(IN_PARTS))
        return made.lower(step_test.new_state(method()), rollouts()).as_text()

    def absent(*args):
        raise AssertionError("the ledger is off")

    wanted = program()
    for name in ("record", "update_marks"):
        monkeypatch.setattr(step, name, absent)
    monkeypatch.setattr(step.compose, "walk", absent)
    monkeypatch.setattr(step, "merge_marks", lambda *args: None)
    monkeypatch.setattr(step, "Seen", lambda *args: ledger.Seen(*[None] * 3))
    assert program() == wanted
    step.make_train_step.cache_clear()


def test_on_it_changes_no_update():
    (state, metrics), (plain, plain_metrics) = stepped(SEVERAL), stepped(SEVERAL, None)
    chex.assert_trees_all_close(state.params, plain.params, rtol=2e-5, atol=1e-6)
    assert {name for name in metrics if not name.startswith(ledger.PREFIX)} == set(plain_metrics)


# In a run.


def tiny_run():
    config = tiny.tiny()
    for stage in config.stages[1:]:
        stage.ledger = fdl.Config(Ledger, first_order_every=3)
        stage.optimizer = fdl.Config(AdamW, learning_rate=3e-4)
    return config


@pytest.fixture(scope="module")
def finished(own_folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("ledger") / "run"
    loop.train(tiny_run(), out, quiet=True)
    return out


def test_a_run_writes_a_ledger_beside_its_metrics(finished):
    lines, metrics = read_metrics(finished / "ledger.jsonl"), read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["stage"] for line in lines] == ["before"] * 5 + ["after"] * 4
    assert [line["step"] for line in lines if "ledger/first_order" in line] == [0, 3, 6]
    assert all(key in ("step", "stage") or key.startswith("ledger/") for line in lines for key in line)
    assert not any(key.startswith("ledger/") for line in metrics for key in line)
    covariances = [line["cov/mean"] for line in metrics if "cov/mean" in line]
    np.testing.assert_allclose([line["ledger/covariance"] for line in lines], covariances, rtol=1e-4, atol=1e-7)


def test_lemma_1_follows_what_was_measured(finished):
    lines = read_metrics(finished / "ledger.jsonl")
    lemma, measured = (np.array([line[f"ledger/{k}"] for line in lines]) for k in ("lemma1", "entropy_change"))
    assert np.corrcoef(lemma, measured)[0, 1] > 0.98


def test_a_resumed_run_writes_the_same_ledger(finished, tmp_path):
    """Checkpoints are at 3, 5 and 8: some lines are written twice, and a torn one is dropped."""
    out = tmp_path / "run"
    tiny.train_until(7, tiny_run(), out)
    with (out / "ledger.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "led')
    loop.train(tiny_run(), out, resume=True, quiet=True)
    for name in ("ledger.jsonl", "metrics.jsonl"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_without_a_ledger_there_is_no_file(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"stage": "rl", "actor/entropy": 1.0})
        writer.offset()
        assert not (tmp_path / "ledger.jsonl").exists()
        writer.write(1, {"stage": "rl", "ledger/lemma1": 0.5, "actor/entropy": 1.0})
    assert (tmp_path / "ledger.jsonl").read_text() == '{"ledger/lemma1": 0.5, "stage": "rl", "step": 1}\n'
    assert (tmp_path / "metrics.jsonl").read_text().count("ledger") == 0
