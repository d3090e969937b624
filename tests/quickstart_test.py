"""What the quickstart makes of its four runs: table, law, picture; the runs themselves are synthetic."""

import json

import numpy as np
import pytest

from jentropy import embedded, quickstart
from jentropy.theory.law import fit_law

REWARDS = {"shift_grpo": 0.5, "shift_clip_cov": 0.95, "shift_entropy_bonus": 0.97}


def evaluation(step, stage, entropy, reward):
    keys = {"val/entropy": entropy, "val/reward/mean@8": reward, "val/reward_hard/mean@8": reward / 2}
    return {"step": step, "stage": stage, "val/pass@8": 0.99, "val/num_prompts": 512} | keys


def lines_of(config):
    """Metrics of a LAW run that follows R = 1.4 - .4 exp(H), or of a SHIFT run that ends at `REWARDS`."""
    lines, shift = [], config.name in REWARDS
    for step in range(sum(stage.steps for stage in config.stages[1:])):
        stage = "law" if not shift else "before_shift" if step < embedded.SHIFT_STEP else "after_shift"
        entropy = 0.7 * float(np.exp(-step / 40))
        reward = REWARDS[config.name] if shift else 1.4 - 0.4 * float(np.exp(entropy))
        if step % 10 == 0:
            lines.append(evaluation(step, stage, entropy, reward))
        lines.append({"step": step, "stage": stage, "actor/entropy": 0.25 if shift else entropy})
    last = evaluation(lines[-1]["step"] + 1, stage, 0.0, REWARDS[config.name] if shift else 1.0)
    return [*lines, last | {"final": True, "val/reward/greedy": 0.9}]


@pytest.fixture
def trained(monkeypatch):
    """`train` writes `lines_of` the config; the names of the runs in order."""
    names = []

    def train(config, out, *, quiet):
        assert quiet
        names.append(config.name)
        out.mkdir(parents=True)
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of(config)))

    monkeypatch.setattr(quickstart, "train", train)
    return names


def test_the_quickstart_ends_with_a_table_the_law_and_a_picture(trained, tmp_path):
    text = quickstart.quickstart(tmp_path, quiet=True)
    assert trained == ["law_grpo", *REWARDS]
    assert (tmp_path / "summary.md").read_text() == text + "\n"
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    rows = {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]] for line in text.splitlines()[2:5]}
    assert list(rows) == ["GRPO", "GRPO + Clip-Cov", "GRPO + entropy bonus"]
    assert rows["GRPO"][1] == "never" and rows["GRPO + Clip-Cov"][1] == "10"
    assert [float(cell) for cell in rows["GRPO + entropy bonus"]] == pytest.approx(
        [0.25, 10, 0.97, 0.485, 0.99], abs=0.01
    )
    assert "R = -0.400 exp(H) + 1.400, R² 1.000" in text and "ceiling at zero entropy 1.000" in text
    assert "entropy 0.70 -> 0.00 nats, reward 0.59 -> 1.00" in text


def test_every_figure_says_how_many_prompts_and_samples_stand_behind_it(trained, tmp_path):
    text = quickstart.quickstart(tmp_path, quiet=True)
    for words in ("last 10 rollouts of 256 responses each", "128 held-out prompts x 8", "512 held-out prompts x 8"):
        assert words in text


def test_runs_that_follow_no_law_still_have_a_table_and_a_picture(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "law_of", lambda lines: fit_law([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]))
    text = quickstart.quickstart(tmp_path, quiet=True)
    assert "The law of plain GRPO: no fit, " in text and "GRPO + Clip-Cov" in text
    assert (tmp_path / "quickstart.png").exists()
