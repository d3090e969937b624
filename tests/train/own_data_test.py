"""The example of one's own data, from its files to a trained policy, with fewer steps."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jentropy import config as config_lib
from jentropy.policy.transformer import transformer
from jentropy.rewards import workers
from jentropy.train import loop, stepper
from jentropy.train.evaluate import Evaluator
from jentropy.train.metrics import read_metrics
from jentropy.train.sharding import MeshShape, make_mesh
from jentropy.train.warm_start import warm_start_name

EXAMPLE = Path(__file__).resolve().parents[2] / "experiments" / "examples"
SMALL = (
    "stages.0.steps=2", "stages.0.batch_size=16", "stages.1.steps=2", "stages.1.num_prompts=4",
    "stages.1.num_generations=4", "policy.width=16", "policy.num_layers=1", "policy.mlp_width=16",
    "evaluation.num_prompts=32", "evaluation.final_num_prompts=32", "evaluation.num_samples=2",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The example's config, copied with its files, as a user would."""
    folder = tmp_path_factory.mktemp("example")
    for file in EXAMPLE.glob("arithmetic_*.py"):
        shutil.copy(file, folder)
    spec = importlib.util.spec_from_file_location("arithmetic_data", folder / "arithmetic_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    return config_lib.apply_overrides(config_lib.load_config(folder / "arithmetic_config.py"), SMALL)


def test_it_trains(config, tmp_path):
    before = workers.counters()
    final = loop.train(config, tmp_path / "run", quiet=True)
    assert final["final"] and 0 <= final["val/reward/mean@2"] <= 1.1
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "critic/score/mean" in line]
    assert [line["step"] for line in lines] == [0, 1]
    assert not any(name.startswith("val/reward/difficulty") for name in final)
    assert config_lib.identity(config_lib.load(tmp_path / "run" / "config.json")) == config_lib.identity(config)
    found = workers.counters()
    assert all(found[name] == before[name] for name in ("hang", "crash", "flood", "exception"))


def test_rewards_are_added_with_their_weights(config):
    experiment = config_lib.build(config)
    assert experiment.task.reward_weights == (1.0, 0.1)
    template = stepper.state_template(experiment, transformer(experiment.policy), make_mesh(MeshShape()), 1)
    assert template.estimator_state.reward_weights.shape == (2,)
    state = stepper.fresh_state(experiment, 1, {}, np.int32(0), jax.random.key(0))
    np.testing.assert_allclose(state.estimator_state.reward_weights, [1.0, 0.1])


def test_a_warm_start_is_that_of_its_data(config, tmp_path):
    before = warm_start_name(config, make_mesh(MeshShape()))
    path = Path(config.task.path)
    text = path.read_text()
    path.write_text(text + json.dumps({"prompt": "90+1=", "answer": 91, "response": "91"}) + "\n")
    assert warm_start_name(config, make_mesh(MeshShape())) != before
    path.write_text(text)
    assert warm_start_name(config, make_mesh(MeshShape())) == before


def test_reports_tell_files_apart():
    parts = np.array(["b", "a", "b", "unused"], object)
    evaluator = SimpleNamespace(
        _task=SimpleNamespace(difficulty_field="part"), _prompts=SimpleNamespace(fields={"part": parts}), _hard_from=4
    )
    found = Evaluator._by_difficulty(evaluator, np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    assert found == {"val/reward/difficulty=a": 1.0, "val/reward/difficulty=b": 0.25}
