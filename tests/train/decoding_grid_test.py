"""The grid of temperatures: what it asks of a decoder, what it makes of the answers, a real one on a small policy."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jentropy.train import loop

FILE = Path(__file__).resolve().parents[2] / "experiments" / "decoding_grid.py"

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture(scope="module")
def grid():
    spec = importlib.util.spec_from_file_location("decoding_grid", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake(grid, asked):
    """Two prompts, four responses each, ten tokens of 0.0 to 0.9 nats; right are as many as `high` says."""

    def decode(sampler):
        high, low, threshold = (float(x) for x in sampler.init())
        asked.append((high, low, round(threshold, 6)))
        reward = (np.arange(4)[None, :] < np.array([[int(high)], [0]])).astype(np.float32)
        entropy = np.arange(10) / 10
        return grid.Drawn(reward, entropy * low, np.where(entropy >= threshold, high, low).astype(np.float32))

    return decode


def test_the_threshold_is_a_quantile_and_every_pair_is_measured(grid):
    asked = []
    threshold, cells = grid.measure(fake(grid, asked), (1.0, 2.0), 0.75)
    assert threshold == pytest.approx(0.675)
    assert asked == [(1.0, 1.0, 0.0), *((high, low, 0.675) for high in (1.0, 2.0) for low in (1.0, 2.0))]
    assert {pair: float(cell.reward.mean()) for pair, cell in cells.items()} == {
        (1.0, 1.0): 0.125, (1.0, 2.0): 0.125, (2.0, 1.0): 0.25, (2.0, 2.0): 0.25,
    }  # fmt: skip
    assert all(cell.solved.tolist() == [1.0, 0.0] for cell in cells.values())
    assert cells[1.0, 2.0].entropy == pytest.approx(0.9) and cells[2.0, 1.0].high_fraction == 0.3


def test_the_report_names_the_best_cell_and_its_gain(grid):
    args = SimpleNamespace(num_samples=4, num_prompts=64, quantile=0.75, run=None, command="python grid.py")
    threshold, cells = grid.measure(fake(grid, []), (1.0, 2.0), 0.75)
    text = grid.report(cells, threshold, args)
    assert "Best mean reward: 0.250 at 2 and 1, +0.125 [+0.000, +0.250] against 1 and 1." in text
    assert "| 2               |       0.250 |       0.250 |" in text
    assert "`python grid.py`" in text and "0.675 nats" in text


def test_a_policy_is_decoded_with_one_program(grid, tmp_path, monkeypatch):
    tiny.train_until(4, tiny.tiny(), tmp_path / "run")
    monkeypatch.setattr(grid.embedded, "law", tiny.tiny)
    for run in (None, tmp_path / "run"):
        decode = grid.Decoder(run, 64, 2)
        _, cells = grid.measure(decode, (0.5, 1.5), 0.5)
        assert cells[0.5, 0.5].entropy < cells[0.5, 1.5].entropy < cells[1.5, 1.5].entropy
        assert cells[0.5, 1.5].reward.shape == (64,)
    before = loop.num_compilations()
    decode(grid.entropy_temperature(high=0.9, low=1.1, threshold=0.2))
    assert loop.num_compilations() == before
    assert jnp.isfinite(cells[1.5, 0.5].high_fraction)
