"""What the documents say is true: files exist, examples run, the configs they show build."""

import doctest
import re
from pathlib import Path

import numpy as np
import pytest
import toy

from jentropy import config
from jentropy.base import initial_plan
from jentropy.train.experiment import Experiment

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "BUILD.md", "SECURITY.md", "CHANGELOG.md"]


def blocks(document, language):
    text = (ROOT / document).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def test_every_file_of_the_tree_exists():
    folder, missing = ROOT, []
    (tree,) = (block for block in blocks("README.md", "") if block.startswith("jentropy/"))
    for line in tree.splitlines():
        name = line.split()[0]
        path = folder / name if line.startswith(" ") else ROOT / name
        folder = folder if line.startswith(" ") else path
        missing += [] if path.exists() else [str(path.relative_to(ROOT))]
    assert missing == []


def test_every_method_of_the_table_exists():
    files = re.findall(r"^\|.*?\| `([\w/]+\.py)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(files) >= 10
    assert [file for file in files if not (ROOT / "jentropy" / file).exists()] == []


def rows_of_shift() -> dict[str, list[str]]:
    """The rows of means in the ablation's sections of SHIFT, by config file; their first two figures are means."""
    text, found = (ROOT / "experiments" / "results" / "ablation.md").read_text(encoding="utf-8"), {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        lines = [line.strip(" |") for line in section.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line.split("|")] for line in lines] if section.startswith("SHIFT") else []
        configs = {row[0]: row[1].strip("`") for row in rows if row[1].endswith(".py`")}
        for row in rows:
            if row[0] in configs and row[1].isdigit():
                found.setdefault(configs[row[0]], row[3:])
    return found


def test_figures_of_the_methods_are_those_of_the_ablation():
    text, measured = (ROOT / "README.md").read_text(encoding="utf-8"), rows_of_shift()
    cells = re.findall(r"\[config\]\(experiments/configs/(shift_\w+\.py)\)(?:: ([\d.]+), ([\d.]+))? \|", text)
    assert len(cells) >= 30 and len(measured) >= 15
    for name, *figures in cells:
        wanted = [cell.split(" ")[0] for cell in measured.get(name, ["", ""])[:2]]
        assert [float(x) for x in figures if x] == [float(x) for x in wanted if x], name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(r"\b(?:experiments|tests)/[\w/]+\.py\b", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_examples_of_the_readme_run():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.failed == 0 and result.attempted >= 4


def test_the_config_of_the_readme_builds(tmp_path):
    (source,) = (block for block in blocks("README.md", "python") if "get_config" in block)
    path = tmp_path / "readme_config.py"
    path.write_text(source, encoding="utf-8")
    changed = config.apply_overrides(config.load_config(path), ["stages.1.objective.temperature=1.2"])
    experiment = config.build(changed)
    assert isinstance(experiment, Experiment)
    assert experiment.stages[1].objective.temperature == 1.2


def test_the_method_and_config_of_build_md_work(tmp_path):
    method, example = blocks("BUILD.md", "python")
    (tmp_path / "positive_only.py").write_text(method, encoding="utf-8")
    path = tmp_path / "shift_positive_only.py"
    path.write_text(example.replace("jentropy.mechanisms.positive_only", "positive_only"), encoding="utf-8")
    stage = config.build(config.load_config(path)).stages[1]
    batch, signals, advantage = toy.random_batch()
    before = initial_plan(batch, advantage)
    after = toy.update(stage.objective.mechanisms, signals, advantage)
    expected = np.where(np.asarray(before.advantage) < 0, 0.1, 1.0) * np.asarray(batch.loss_mask)
    np.testing.assert_allclose(after.pg_weight, expected, rtol=1e-6)
    negative = np.asarray(batch.loss_mask & (before.advantage < 0))
    found = [int(x) for x in after.metrics["positive_only/fraction"]]
    assert found == [negative.sum(), np.asarray(batch.loss_mask).sum()]


def test_the_version_of_setup_has_a_place_in_the_changelog():
    assert re.search(r'version="\d+\.\d+\.\d+"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
