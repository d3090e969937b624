"""What-if on a kept step of a tiny run: directions against real steps and finite differences, and the command."""

import json

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jentropy import cli, compose
from jentropy import config as config_lib
from jentropy.advantages.rloo import rloo
from jentropy.base import ENTROPY, Array, Mechanism, Quantities, Signals
from jentropy.mechanisms.clip_cov import clip_cov
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.mechanisms.kl_reference import kl_reference
from jentropy.mechanisms.semantic_entropy import semantic_entropy
from jentropy.mechanisms.siren import siren
from jentropy.stats import masked_mean
from jentropy.train import directions
from jentropy.train.compilations import num_compilations
from jentropy.train.kept import KeptError, load_kept
from jentropy.train.metrics import divide
from jentropy.train.scoring import make_scorer
from jentropy.train.step import make_train_step
from jentropy.train.stepper import stage_spec
from jentropy.train.what_if import GRPO, methods, rank_agreement, several, what_if

pytestmark = pytest.mark.usefixtures("own_folders")

STEP = 2
OWN = "tiny (run)"


def mean_entropy(scores: Quantities, signals: Signals) -> Array:
    return masked_mean(scores["entropy"], signals.batch.loss_mask)


def spend() -> Mechanism:
    """Adds the mean entropy to the loss: the opposite of a bonus."""
    return compose.penalty(mean_entropy, outputs=(ENTROPY,))


def bonus(coefficient=1.0, name="bonus") -> fdl.Config:
    return tiny.with_method({"entropy_bonus": fdl.Config(entropy_bonus, entropy_coef=coefficient)}, name)


def selecting() -> fdl.Config:
    mechanisms = {"clip_cov": fdl.Config(clip_cov, clip_cov_ratio=0.2, clip_cov_lb=0.0, clip_cov_ub=50.0)}
    return tiny.with_method(mechanisms, "clip_cov")


def leave_one_out() -> fdl.Config:
    config = tiny.with_method({"siren": fdl.Config(siren, top_p=0.8)}, "siren_rloo", estimator=fdl.Config(rloo))
    for stage in config.stages[1:]:
        stage.eos_in_loss = False
    return config


def answers() -> fdl.Config:
    return tiny.with_method({"semantic_entropy": fdl.Config(semantic_entropy)}, "answers")


def with_kl() -> fdl.Config:
    config = tiny.with_method({"kl": fdl.Config(kl_reference)}, "with_kl")
    for stage in config.stages[1:]:
        stage.reference = True
    return config


@pytest.fixture(scope="module")
def command(kept_run, tmp_path_factory):
    """The command with three configs: exit code, text and JSON."""
    folder = tmp_path_factory.mktemp("configs")
    for name in ("bonus", "selecting", "leave_one_out"):
        source = f"import what_if_test\n\n\ndef get_config():\n    return what_if_test.{name}()\n"
        (folder / f"{name}_config.py").write_text(source)
    paths = [str(path) for path in sorted(folder.glob("*_config.py"))]
    out = folder / "new" / "what_if.json"
    argv = ["what-if", str(kept_run), "--step", str(STEP), "--config", *paths[:2], "--config", paths[2]]
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda text, **options: lines.append(text))
        code = cli.main([*argv, "--out", str(out)])
    return code, "\n".join(lines), json.loads(out.read_text())


def by_name(found):
    return {outcome["name"]: outcome for outcome in found["outcomes"]}


def test_the_command_compares_all_methods(command):
    code, text, found = command
    assert code == 0 and (found["step"], found["stage"]) == (STEP, "before")
    assert list(by_name(found)) == [GRPO, OWN, "bonus", "siren_rloo", "clip_cov"]
    assert f"step 2 of stage 'before': {found['num_tokens']} tokens, entropy {found['entropy']:.4f} nats" in text
    for name, outcome in by_name(found).items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
        assert f"{outcome['predicted']:+.3e}" in line and f"{outcome['loss']:+.4g}" in line
        share = ", ".join(f"{mechanism} {share:.2%}" for mechanism, share in outcome["touched"].items())
        assert line.rstrip(" |").endswith(share)
    assert "measured" not in text
    assert found["rank_agreement"] is None and found["updates"] == {}


def test_the_runs_own_grpo_is_plain_grpo(command):
    outcomes = by_name(command[2])
    plain, own = outcomes[GRPO], outcomes[OWN]
    assert plain["cosine_gradient"] == pytest.approx(1, abs=1e-6)
    assert own["cosine_gradient"] == pytest.approx(1, abs=1e-5), "they differ in ε only"
    assert own["cosine_update"] == pytest.approx(1, abs=1e-5)
    assert own["predicted"] == pytest.approx(plain["predicted"], rel=1e-3)
    for name in ("bonus", "siren_rloo", "clip_cov"):
        assert -1 <= outcomes[name]["cosine_gradient"] < 1 - 1e-4, name
    assert outcomes["bonus"]["cosine_gradient"] < outcomes["clip_cov"]["cosine_gradient"]


def test_touched_is_a_share_of_the_tokens(command):
    outcomes = by_name(command[2])
    assert outcomes[GRPO]["touched"] == {"clip_range": 1.0}
    assert outcomes["bonus"]["touched"] == {"clip_range": 1.0, "entropy_bonus": 1.0}
    assert 0 < outcomes["clip_cov"]["touched"]["clip_cov"] <= 0.2
    assert outcomes["siren_rloo"]["touched"]["siren"] < 1, "the end of a response is not in its loss"


@pytest.fixture(scope="module")
def real(kept_run):
    """The kept step, its tokens' entropies as a function of parameters, and a real step of one update."""
    kept = load_kept(kept_run, STEP)
    spec = stage_spec(kept.experiment, kept.stage, kept.policy)._replace(num_minibatches=1, num_epochs=1)
    train_step = make_train_step(spec, kept.stage.num_prompts, kept.mesh)
    after, metrics = train_step(jax.tree.map(jnp.copy, kept.state), kept.placed())
    scorer = make_scorer(kept.policy, (ENTROPY,), 1.0)
    entropy = jax.jit(lambda params: scorer(params, {}, kept.placed())["entropy"])
    return kept, entropy, after, divide(metrics)


def test_the_direction_is_that_of_a_real_update(command, real):
    own, metrics = by_name(command[2])[OWN], real[3]
    assert own["loss"] == pytest.approx(metrics["actor/loss"], rel=1e-5, abs=1e-7)
    assert own["gradient_norm"] == pytest.approx(metrics["actor/grad_norm"], rel=1e-5)


def test_the_prediction_is_a_finite_difference_along_the_update(kept_run, real):
    kept, entropy, after, _ = real
    outcome = what_if(kept_run, STEP).outcomes[1]
    update = jax.tree.map(jnp.subtract, after.params, kept.state.params)

    def moved(step):
        return entropy(jax.tree.map(lambda p, d: p + jnp.float32(step) * d, kept.state.params, update))

    slope = np.asarray(moved(0.05) - moved(-0.05), np.float64) / 0.1
    mask = kept.rollouts.loss_mask
    size = np.abs(slope).max()
    assert size > 1e-3
    np.testing.assert_allclose(outcome.predicted_tokens, np.where(mask, slope, 0), atol=1e-2 * size)
    assert outcome.predicted == pytest.approx(slope[mask].mean(), abs=2e-3 * size)
    assert outcome.predicted == pytest.approx(outcome.predicted_tokens[mask].mean(), rel=1e-4)


def test_a_measured_step_is_the_real_one(kept_run, real):
    kept, entropy, after, _ = real
    own = [tiny.keeping()]  # no other method
    found = what_if(kept_run, STEP, own, measure=True, updates=1)
    mask = kept.rollouts.loss_mask
    change = np.asarray(entropy(after.params) - entropy(kept.state.params))[mask].mean()
    assert found.outcomes[1].measured == pytest.approx(change, rel=1e-3, abs=1e-6)
    assert found.updates == {GRPO: 1, OWN: 1} and found.rank_agreement is None
    assert "rank agreement of predicted and measured dH: needs three methods that differ" in found.text()


@pytest.mark.parametrize(("updates", "cut"), [(None, (2, 2)), (4, (2, 2)), (6, (2, 3)), (3, (1, 3)), (1, (1, 1))])
def test_updates_are_over_minibatches_where_they_divide(real, updates, cut):
    spec = several(real[0], real[0].stage, updates)
    assert (spec.num_minibatches, spec.num_epochs) == cut


def down_and_up(coefficient):
    return [tiny.with_method({"spend": fdl.Config(spend)}, "spend"), bonus(coefficient)]


def test_the_rank_agrees_with_real_steps(kept_run):
    found = what_if(kept_run, STEP, down_and_up(1.0), measure=True)
    change = {outcome.name: (outcome.predicted, outcome.measured or 0.0) for outcome in found.outcomes}
    for of in (0, 1):
        assert change["spend"][of] < change[OWN][of] < change["bonus"][of]
    assert found.rank_agreement is not None and found.rank_agreement > 0.79
    assert found.updates == dict.fromkeys(change, 4)
    text = found.text()
    assert "measured after updates: grpo 4, tiny (run) 4, spend 4, bonus 4" in text
    assert f"rank agreement of predicted and measured dH: {found.rank_agreement:.3f}" in text
    assert f"{change['bonus'][1]:+.3e}" in text


def test_methods_that_differ_in_numbers_share_one_program(kept_run):
    first = what_if(kept_run, STEP, down_and_up(0.1))
    before, programs = num_compilations(), directions.make_directions.cache_info().misses
    second = what_if(kept_run, STEP, down_and_up(0.3))
    assert num_compilations() == before and directions.make_directions.cache_info().misses == programs
    assert second.outcomes[3].predicted > first.outcomes[3].predicted, "a larger bonus, more entropy"
    assert second.outcomes[2] == first.outcomes[2]._replace(predicted_tokens=second.outcomes[2].predicted_tokens)


def test_nothing_to_do_has_no_cosine(kept_run, monkeypatch):
    """Rewards that are all equal: plain GRPO's gradient is 0."""

    def load(run, step, config=None):
        kept = load_kept(run, step, config)
        return kept._replace(rollouts=kept.rollouts.replace(rewards=np.zeros_like(kept.rollouts.rewards)))

    monkeypatch.setattr("jentropy.train.what_if.load_kept", load)
    outcomes = what_if(kept_run, STEP, down_and_up(1.0)).outcomes
    assert [outcome.cosine_gradient for outcome in outcomes] == [None] * 4
    assert outcomes[0].gradient_norm == 0 and outcomes[3].gradient_norm > 0
    assert outcomes[0].cosine_update == pytest.approx(1, abs=1e-6), "momentum moves the parameters all the same"


def test_equal_names_are_told_apart(real):
    names = [method.name for method in methods(real[0], [bonus(), bonus(0.5), bonus(0.25), bonus(1.0, GRPO)])]
    assert names == [GRPO, OWN, "bonus", "bonus (2)", "bonus (3)", "grpo (2)"]


def test_a_batch_without_tokens_or_with_bad_numbers_is_refused(kept_run, monkeypatch):
    def load(run, step, config=None):
        kept = load_kept(run, step, config)
        return kept._replace(rollouts=kept.rollouts.replace(**changes))

    rollouts = load_kept(kept_run, STEP).rollouts
    monkeypatch.setattr("jentropy.train.what_if.load_kept", load)
    changes = {"loss_mask": np.zeros_like(rollouts.loss_mask)}
    with pytest.raises(KeptError, match="the rollout of step 2 has no token to train on"):
        what_if(kept_run, STEP)
    changes = {"rewards": np.full_like(rollouts.rewards, np.inf)}
    with pytest.raises(KeptError, match=r"grpo, step 2: its (loss|gradient) is nan"):
        what_if(kept_run, STEP)


def test_the_rank_correlation():
    assert rank_agreement([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]) == pytest.approx(1)
    assert rank_agreement([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert rank_agreement([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert rank_agreement([1.0, 1.0, 2.0], [5.0, 5.0, 6.0]) is None, "two of them are one"
    assert rank_agreement([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) is None


def refused(capsys, *argv):
    """What a command that ends with exit code 2 says, in one line."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("jentropy: ") and captured.err.count("\n") == 1
    return captured.err


def test_what_does_not_fit_is_refused(kept_run, tmp_path, capsys):
    run = ("what-if", str(kept_run), "--step")
    assert "no rollout of step 7 is kept; steps there: 0, 2, 3, 4, 6" in refused(capsys, *run, "7")
    assert "--updates is for --measure" in refused(capsys, *run, "2", "--updates", "2")
    assert "updates must be at least 1, got 0" in refused(capsys, *run, "2", "--measure", "--updates", "0")
    assert "no such Python file" in refused(capsys, *run, "2", "--config", str(tmp_path / "missing.py"))
    for name, said in (
        ("answers", "answers: it needs answer_id, which the rollout of step 2 does not hold; it holds "),
        ("with_kl", "with_kl: it needs ref_log_prob, which step 2 does not hold: the state has no reference policy"),
    ):
        path = tmp_path / f"{name}_config.py"
        path.write_text(f"import what_if_test\n\n\ndef get_config():\n    return what_if_test.{name}()\n")
        assert said in refused(capsys, *run, "2", "--config", str(path))
    with pytest.raises(KeptError, match=r"other: its temperature is 0\.5"):
        what_if(kept_run, STEP, [tiny.with_method(temperature=0.5)])
    with pytest.raises(KeptError, match=r"odd does not fit the rollout of step 2: num_prompts must be a multiple of"):
        odd = config_lib.apply_overrides(tiny.with_method(name="odd"), ["stages.1.num_prompts=3"])
        odd.stages[1].num_minibatches = 3
        what_if(kept_run, STEP, [odd])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("replay", ["RUN", "keep_rollouts", "--step", "--config CONFIG.py", "use the method of this config"]),
        ("what-if", ["RUN", "--step", "--config CONFIG.py", "--measure", "--updates M", "--out FILE.json"]),
    ],
)
def test_help_is_enough(capsys, command, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and [word for word in words if word not in text] == []
