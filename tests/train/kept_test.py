"""Kept rollouts of a tiny run: what is stored and comes back, resumed runs, and steps replayed bit by bit."""

import hashlib
import json
import shutil

import fiddle as fdl
import jax
import numpy as np
import pytest
import tiny
import toy

from jentropy import cli
from jentropy import config as config_lib
from jentropy.advantages.rloo import rloo
from jentropy.mechanisms.adaptive_entropy import adaptive_entropy
from jentropy.mechanisms.clip_cov import clip_cov
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.mechanisms.kl_reference import kl_reference
from jentropy.train import kept, loop, replay
from jentropy.train.checkpoint import CorruptCheckpointError
from jentropy.train.doctor import doctor
from jentropy.train.kept import DamagedKeptError, KeptError, load_kept, load_rollouts
from jentropy.train.metrics import read_metrics
from jentropy.train.other_method import other_stage, state_under
from jentropy.train.quarantine import Batch, flatten
from jentropy.train.replay import ReplayError, replay_kept

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture(scope="module")
def run(kept_run):
    return kept_run


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def config_file(tmp_path):
    """Writes a config file that defines `get_config` by an expression of this module."""

    def write(expression, name="another"):
        path = tmp_path / f"{name}_config.py"
        path.write_text(f"import kept_test\n\n\ndef get_config():\n    return kept_test.{expression}\n")
        return str(path)

    return write


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("step-*")}


def bits(state):
    state = state.replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def test_the_named_steps_are_kept_and_nothing_else(run):
    assert kept.kept_steps(run) == list(tiny.KEPT)
    assert sorted(path.name for path in (run / "rollouts" / "states").iterdir()) == [str(step) for step in tiny.KEPT]
    description = json.loads((run / "rollouts" / "step-00000006.json").read_bytes())
    assert (description["stage"], description["stage_index"], description["seed"]) == ("after", 2, 0)
    assert description["rewards"] == ["chain_sum"] and len(description["example_id"]) == 4
    assert description["row_id"] == list(range(16))
    without = tiny.tiny()
    assert config_lib.build(without).keep_rollouts == ()


def test_a_kept_step_is_what_the_run_took(run):
    found = load_kept(run, 6)
    assert found.stage.name == "after" and found.index == 2 and found.step == 6
    assert int(found.state.step) == 6 and found.rollouts.tokens.shape[0] == 16
    assert set(found.state.mechanism_state) == {"clip_range", "bonus"}
    prompts = found.experiment.task.prompts("train", found.stage.mixture).batch(0, 6, 4)
    np.testing.assert_array_equal(found.example_id, prompts.example_id)
    lines = {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if "critic/score/mean" in line}
    np.testing.assert_allclose(found.rollouts.rewards.mean(), lines[6]["critic/score/mean"], rtol=1e-6)


def test_a_run_without_kept_rollouts_has_the_same_metrics(run, tmp_path):
    config = tiny.keeping()
    config.keep_rollouts = ()
    tiny.train_until(4, config, tmp_path / "run")
    assert not (tmp_path / "run" / "rollouts").exists()
    written = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert written and (run / "metrics.jsonl").read_bytes().startswith(written)


# Checkpoints are at 3 and 5: rollouts 3 and 4 are made again.
def test_a_resumed_run_keeps_equal_bytes(run, tmp_path):
    out = tmp_path / "run"
    tiny.train_until(5, tiny.keeping("checkpoint_every=3"), out)
    assert kept.kept_steps(out) == [0, 2, 3, 4]
    shutil.rmtree(out / "checkpoints" / "5")
    first = files(out / "rollouts")
    (out / "rollouts" / "step-00000004.safetensors").write_bytes(b"torn")
    loop.train(tiny.keeping(), out, resume=True, quiet=True)
    assert files(out / "rollouts") == files(run / "rollouts")
    assert {name: files(out / "rollouts")[name] for name in first} == first
    for step in tiny.KEPT:
        assert bits(load_kept(out, step).state) == bits(load_kept(run, step).state)


def test_other_steps_may_be_kept_after_a_resume(run, tmp_path):
    out = tmp_path / "run"
    tiny.train_until(4, tiny.keeping(), out)
    assert kept.kept_steps(out) == [0, 2, 3]
    config = config_lib.apply_overrides(tiny.keeping(), ["keep_rollouts=(0, 5)"])
    loop.train(config, out, resume=True, quiet=True)
    assert kept.kept_steps(out) == [0, 2, 5], "rollout 3 came after the checkpoint, and is not to be kept any more"
    assert (out / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_arrays_of_every_type_come_back_bit_by_bit(tmp_path):
    mask = np.arange(5)[None, :] < np.array([[2], [5], [0]])
    rows = toy.rollouts(mask, logp_old=np.full(mask.shape, np.nan, np.float32))
    half = jax.numpy.arange(3, dtype=jax.numpy.bfloat16)
    rows = rows.replace(row_data={"half": half, "no/slash": mask[:, 0]}, token_data={"t": mask.astype(np.float32).T.T})
    for name in ("a", "b"):
        kept.save_rollouts(tmp_path / name / "rollouts", Batch(rows, np.array([2**40])), {"step": 3})
    assert files(tmp_path / "a" / "rollouts") == files(tmp_path / "b" / "rollouts")
    batch, _ = load_rollouts(tmp_path / "a", 3)
    before, after = flatten(rows), flatten(batch.rollouts)
    assert list(batch.example_id) == [2**40] and before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype and after[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("step", tiny.KEPT)
def test_a_replay_is_the_step_of_the_run_bit_by_bit(run, step):
    found = replay_kept(run, step)
    assert found.differs == {} and found.exit_code == 0
    assert len(found.found) > 20 and "actor/loss" in found.found
    assert ("ledger/first_order" in found.found) == (step == 6), "the ledger is compared as well"
    assert found.text() == f"step {step} of stage {found.stage!r}: equal in all {len(found.found)} keys"


def test_the_command_says_that_all_is_equal(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(["replay", str(run), "--step", "3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("step 3 of stage 'before': equal in all ") and text.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_command_names_the_keys_that_differ(copy, capsys):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 3 and "actor/loss" in line)
    row = json.loads(lines[at])
    right, wrong = row["actor/grad_norm"], float(np.nextafter(row["actor/grad_norm"], 9))
    del row["actor/loss"]
    lines[at] = json.dumps({**row, "actor/grad_norm": wrong}, sort_keys=True)
    (copy / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert cli.main(["replay", str(copy), "--step", "3"]) == 1
    text = capsys.readouterr().out
    assert f"2 of {len(row) - 1} keys differ" in text
    assert repr(wrong) in text and repr(right) in text and "actor/loss" in text and "actor/entropy" not in text


def test_under_another_method_the_metrics_stand_side_by_side(run, capsys, config_file):
    path = config_file("bonus()")
    assert cli.main(["replay", str(run), "--step", "2", "--config", path]) == 0
    text = capsys.readouterr().out
    assert text.startswith("step 2 of stage 'before' under bonus, from the same state and rollout\n")
    cells = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}
    assert cells["metric"] == ["run", "replayed"]
    assert cells["critic/score/mean"][0] == cells["critic/score/mean"][1], "the rollout is the run's"
    assert cells["actor/loss"][0] != cells["actor/loss"][1]
    assert cells["actor/entropy_loss"][0] == "-"


def test_the_runs_own_config_is_no_other_method(run, config_file):
    assert replay_kept(run, 3, tiny.keeping()).method is None
    renamed = config_lib.apply_overrides(tiny.keeping(), ["name=renamed"])
    again = replay_kept(run, 6, renamed)
    assert again.method == "renamed" and again.differs == {}, "the same method from the same state"


def test_a_mechanism_goes_on_from_its_state_or_begins_afresh(run):
    step = load_kept(run, 6)
    state = step.state.mechanism_state["bonus"]

    def under(config):
        return state_under(step, other_stage(step, config))

    same = under(tiny.with_method({"first": fdl.Config(clip_cov), "bonus": fdl.Config(adaptive_entropy)}))
    assert set(same.mechanism_state) == {"clip_range", "first", "bonus"}
    np.testing.assert_array_equal(same.mechanism_state["bonus"], state)
    changed = tiny.with_method({"bonus": fdl.Config(adaptive_entropy, entropy_target=0.7)})
    afresh = under(changed).mechanism_state["bonus"]
    fresh = adaptive_entropy(entropy_target=0.7).init()
    jax.tree.map(np.testing.assert_array_equal, afresh, fresh)
    slow = tiny.with_method({"bonus": fdl.Config(adaptive_entropy)})
    slow.stages[2].optimizer = fdl.Config(type(step.stage.optimizer), learning_rate=1e-7)
    moments, moved = step.state.opt_state, under(slow).opt_state
    jax.tree.map(np.testing.assert_array_equal, moments[:-1], moved[:-1])
    assert float(moved[-1].hyperparams["step_size"]) == pytest.approx(-1e-7)
    estimator = under(tiny.with_method(estimator=fdl.Config(rloo))).estimator_state
    assert jax.tree.structure(estimator) == jax.tree.structure(rloo().init())


def refused(capsys, *argv):
    """What a command that ends with exit code 2 says, in one line."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("jentropy: ") and captured.err.count("\n") == 1
    return captured.err


def test_what_cannot_be_replayed_says_why(copy, tmp_path, capsys, config_file):
    run = str(copy)
    assert "step-00000005.json: no rollout of step 5 is kept; steps there: 0, 2, 3, 4, 6" in refused(
        capsys, "replay", run, "--step", "5"
    )
    assert "holds no run: no config.json" in refused(capsys, "replay", str(tmp_path / "nowhere"), "--step", "5")
    path = config_file("with_kl()", "kl")
    assert "reference must be True" in refused(capsys, "replay", run, "--step", "3", "--config", path)
    path = config_file("cold()", "cold")
    said = refused(capsys, "replay", run, "--step", "3", "--config", path)
    assert "other: its temperature is 0.5, and step 3 was sampled at 1" in said
    path = config_file("with_reference()", "reference")
    said = refused(capsys, "replay", run, "--step", "3", "--config", path)
    assert "with_kl: it needs ref_log_prob, which step 3 does not hold" in said and "reference=False" in said
    path = config_file("renamed_stages()", "stages")
    said = refused(capsys, "replay", run, "--step", "0", "--config", path)
    assert "no stage 'before' like that of step 0; of reinforcement learning it has 'a', 'b'" in said
    (copy / "metrics.jsonl").write_text("")
    with pytest.raises(ReplayError, match=r"metrics\.jsonl has no line of rollout 3"):
        replay_kept(copy, 3)
    shutil.rmtree(copy / "rollouts")
    with pytest.raises(KeptError, match="steps there: none; `keep_rollouts` of the config names them"):
        load_kept(copy, 3)


def bonus() -> fdl.Config:
    return tiny.with_method({"entropy_bonus": fdl.Config(entropy_bonus, entropy_coef=0.5)}, "bonus")


def with_kl() -> fdl.Config:
    return tiny.with_method({"kl": fdl.Config(kl_reference)}, "with_kl")


def cold() -> fdl.Config:
    return tiny.with_method(temperature=0.5)


def with_reference() -> fdl.Config:
    config = with_kl()
    for stage in config.stages[1:]:
        stage.reference = True
    return config


def renamed_stages() -> fdl.Config:
    """Two stages of reinforcement learning, neither named nor placed as that of rollout 0."""
    config = config_lib.apply_overrides(tiny.with_method(), ["stages.1.name=a", "stages.2.name=b"])
    config.stages = (config.stages[1], config.stages[0], config.stages[2])
    return config


def test_damaged_files_are_named(copy, capsys):
    folder = copy / "rollouts"
    arrays, description = folder / "step-00000003.safetensors", folder / "step-00000003.json"
    content, text = arrays.read_bytes(), description.read_text()
    changed = bytearray(content)
    changed[-1] ^= 1
    arrays.write_bytes(changed)
    assert cli.main(["replay", str(copy), "--step", "3"]) == 65
    assert f"{arrays} is damaged: its checksum is not the one in {description.name}" in capsys.readouterr().err
    arrays.write_bytes(b"no arrays")
    digest = hashlib.sha256(b"no arrays").hexdigest()
    description.write_text(json.dumps({**json.loads(text), "sha256": digest}))
    with pytest.raises(DamagedKeptError, match="is damaged"):
        load_rollouts(copy, 3)
    arrays.unlink()
    with pytest.raises(DamagedKeptError, match=f"{arrays.name} is missing"):
        load_rollouts(copy, 3)
    for broken, said in (("{", "is damaged"), ('{"step": 4}', "it does not describe step 3"), ("[]", "describe")):
        description.write_text(broken)
        with pytest.raises(DamagedKeptError, match=said):
            load_rollouts(copy, 3)
    state = max((folder / "states" / "0").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    changed = bytearray(state.read_bytes())
    changed[len(changed) // 2] ^= 1
    state.write_bytes(changed)
    with pytest.raises(CorruptCheckpointError, match=f"{folder / 'states' / '0'} is damaged: "):
        load_kept(copy, 0)
    assert cli.main(["replay", str(copy), "--step", "0"]) == 65
    shutil.rmtree(folder / "states" / "4")
    with pytest.raises(CorruptCheckpointError, match=r"states/4 is missing"):
        load_kept(copy, 4)


def test_the_doctor_looks_at_kept_steps(run, copy):
    report = doctor(run)
    assert report.problems == () and "kept rollouts: 0, 2, 3, 4, 6" in report.notes
    (copy / "rollouts" / "step-00000002.safetensors").write_bytes(b"")
    shutil.rmtree(copy / "rollouts" / "states" / "4")
    first, second = doctor(copy).problems
    assert "step-00000002.safetensors is damaged" in first and second == "kept state 4: MANIFEST.json: missing"


def test_steps_that_the_run_does_not_have_are_refused():
    with pytest.raises(config_lib.ConfigError, match=r"keep_rollouts must be rollouts of the run, in \[0, 9\)"):
        config_lib.build(config_lib.apply_overrides(tiny.tiny(), ["keep_rollouts=(3, 9)"]))
    with pytest.raises(config_lib.ConfigError, match="keep_rollouts: expected"):
        config_lib.apply_overrides(tiny.tiny(), ["keep_rollouts=3.5"])


def test_equal_numbers_are_equal_and_nan_is_nan():
    nan = float("nan")
    recorded = {"a": 1.0, "b": nan, "c": nan, "dynamic/rounds": 2.0, "stage": "rl", "step": 3}
    assert replay.differences({"a": 1.0, "b": nan, "c": 2.0, "d": 0.0}, recorded).keys() == {"c", "d"}
    assert replay.differences({"a": 1.0, "b": nan, "c": nan}, recorded) == {}
