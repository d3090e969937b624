"""Loading, overriding, printing, hashing and building experiment configs."""

import dataclasses
import functools
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import fiddle as fdl
import pytest

from jentropy import config as config_lib
from jentropy.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int | None = None

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    method: Any
    steps: int = 10
    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"exact": 1.0, "format": 0.5})
    size: tuple[int, str] = (4, "rows")
    loss: Callable[..., Any] = max
    optimizer: Optimizer = Optimizer(learning_rate=0.1)


@dataclasses.dataclass(frozen=True)
class Experiment:
    stages: tuple[Stage, ...]
    seed: int = 0
    name: str = "run"
    remat: bool = False
    reference: Optimizer | None = None


def mechanism(*, fraction: float = 2e-4, untyped=3):
    return ("mechanism", fraction, untyped)


@functools.lru_cache
def policy(width: int = 8):
    return ("policy", width)


def chain(**mechanisms: Any):
    return dict(mechanisms)


def make() -> fdl.Config:
    method = fdl.Config(chain, cov=fdl.Config(mechanism), other=fdl.Config(mechanism, fraction=0.5))
    stages = [fdl.Config(Stage, method=method), fdl.Config(Stage, method=fdl.Config(policy), steps=3)]
    return fdl.Config(Experiment, stages=stages)


def get(config: fdl.Config, path: str) -> str:
    lines = dict(line.split(" = ", 1) for line in config_lib.flatten(config))
    return lines[path]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=7", "7"),
        ("name=plain", "'plain'"),
        ("name='a b=c'", "'a b=c'"),
        ("remat=True", "True"),
        ("stages.0.steps=5", "5"),
        ("stages.0.method.cov.fraction=1", "1.0"),
        ("stages.0.method.cov.fraction=inf", "inf"),
        ("stages.0.method.cov.untyped=word", "'word'"),
        ("stages.1.weights.format=2", "2.0"),
        ("stages.1.size.1=tokens", "'tokens'"),
        ("stages.1.optimizer.betas.0=0", "0.0"),
        ("stages.1.optimizer.schedule=cosine", "'cosine'"),
        ("stages.1.optimizer.warmup=4", "4"),
        ("stages.1.optimizer.warmup=None", "None"),
    ],
)
def test_override_reaches_nested_fields(override, expected):
    config = make()
    before = config_lib.flatten(config)
    path = override.partition("=")[0]
    changed = config_lib.apply_overrides(config, [override])
    assert get(changed, path) == expected
    assert config_lib.flatten(config) == before


def test_override_of_whole_sequence_and_mapping_converts_members():
    overrides = ["stages.0.optimizer.betas=[0, 0.5, 1]", "stages.0.weights={'exact': 3}", "stages.0.size=(1, 'x')"]
    built = config_lib.build(config_lib.apply_overrides(make(), overrides))
    assert built.stages[0].optimizer.betas == (0.0, 0.5, 1.0)
    assert all(type(b) is float for b in built.stages[0].optimizer.betas)
    assert built.stages[0].weights == {"exact": 3.0}
    assert built.stages[0].size == (1, "x")
    assert built.stages[0].optimizer.learning_rate == 0.1
    assert built.stages[1].weights == {"exact": 1.0, "format": 0.5}


def test_later_override_wins_and_sequences_keep_their_type():
    config = config_lib.apply_overrides(make(), ["seed=1", "seed=2", "stages.1.steps=4"])
    assert config.seed == 2
    assert type(config.stages) is list


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sed=1", ["sed", "'seed'", "stages, seed, name", "Experiment"]),
        ("stages.0.stepz=1", ["stages.0.stepz", "'steps'", "method, steps", "stages.0"]),
        ("stages.0.method.cof.fraction=1", ["'cof'", "'cov'", "cov, other", "stages.0.method"]),
        ("stages.0.method.cov.fractoin=1", ["'fraction'"]),
        ("stages.0.weights.exakt=1", ["'exact'", "exact, format"]),
        ("stages.2.steps=1", ["stages", "'2'", "0, 1"]),
        ("seed.value=1", ["seed (0) has no fields", "'value'"]),
        ("seed", ["expected path.to.field=value"]),
        ("=3", ["expected path.to.field=value"]),
    ],
)
def test_unknown_field_names_path_nearest_and_valid_names(override, parts):
    with pytest.raises(ConfigError) as error:
        config_lib.apply_overrides(make(), [override])
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("seed=1.5", ["seed", "int", "1.5", "float"]),
        ("seed=True", ["int", "True", "bool"]),
        ("remat=1", ["bool", "1"]),
        ("remat=true", ["bool", "'true'", "str"]),
        ("name=3", ["str", "3"]),
        ("stages.0.method.cov.fraction=many", ["stages.0.method.cov.fraction", "float", "'many'"]),
        ("stages.0.method.cov.fraction=True", ["float", "True"]),
        ("stages.0.optimizer.betas=0.9", ["tuple[float, ...]", "0.9"]),
        ("stages.0.optimizer.betas=(0.9, 'x')", ["tuple[float, ...]"]),
        ("stages.0.optimizer.betas.1=x", ["float", "'x'"]),
        ("stages.0.size=(1,)", ["tuple[int, str]"]),
        ("stages.0.size.0=x", ["int", "'x'"]),
        ("stages.0.weights.exact=x", ["float", "'x'"]),
        ("stages.0.optimizer.schedule=linear", ["Literal", "cosine", "'linear'"]),
        ("stages.0.optimizer.warmup=x", ["int | None", "'x'"]),
        ("reference=1", ["Optimizer", "1"]),
        ("name='" + "x" * 3000 + "'", ["at most 2000"]),
    ],
)
def test_ill_typed_value_names_path_type_and_value(override, parts):
    with pytest.raises(ConfigError) as error:
        config_lib.apply_overrides(make(), [override])
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "override", ["stages=1", "stages.0=x", "stages.0.method=None", "stages.0.optimizer=1", "stages.0.loss=min"]
)
def test_configs_and_functions_are_not_replaced_by_plain_values(override):
    with pytest.raises(ConfigError, match=r"holds .*no plain value replaces"):
        config_lib.apply_overrides(make(), [override])


def test_optional_config_can_be_switched_off():
    config = make()
    config.reference = fdl.Config(Optimizer)
    assert config_lib.apply_overrides(config, ["reference=None"]).reference is None


def test_flatten_lists_callables_defaults_and_empty_nodes():
    lines = config_lib.flatten(make())
    module = __name__
    assert lines[0] == f". = {module}.Experiment(...)"
    assert f"stages.0.method = {module}.chain(...)" in lines
    assert f"stages.1.method = {module}.policy(...)" in lines
    assert "stages.1.method.width = 8" in lines
    assert "stages.0.loss = builtins.max" in lines
    assert "stages.0.optimizer.learning_rate = 0.1" in lines
    assert "stages.0.weights.format = 0.5" in lines
    partial = fdl.Config(chain, a=functools.partial(mechanism, fraction=1.0), b=fdl.Partial(policy), c=())
    assert config_lib.flatten(partial)[1:] == [
        f"a = partial({module}.mechanism, ...)",
        "a.fraction = 1.0",
        "a.untyped = 3",
        f"b = partial({module}.policy, ...)",
        "b.width = 8",
        "c = ()",
    ]


def test_flattened_text_round_trips_and_diffs(tmp_path):
    old = config_lib.flatten(make())
    new = config_lib.flatten(config_lib.apply_overrides(make(), ["seed=9", "name='line\\nbreak'"]))
    config_lib.write_lines(tmp_path / "config.txt", new)
    assert config_lib.read_lines(tmp_path / "config.txt") == new
    assert config_lib.diff(old, old) == ""
    difference = config_lib.diff(old, new).splitlines()
    assert "-seed = 0" in difference and "+seed = 9" in difference
    assert not any("stages" in line for line in difference)


def test_identity_ignores_argument_order_written_defaults_and_sharing():
    betas = (0.5, 0.6)
    first = fdl.Config(
        chain, a=fdl.Config(Optimizer, betas=betas, learning_rate=0.2), b=fdl.Config(Optimizer, betas=betas)
    )
    second = fdl.Config(
        chain,
        a=fdl.Config(Optimizer, learning_rate=0.2, warmup=None, betas=tuple([0.5, 0.6])),
        b=Optimizer(betas=tuple([0.5, 0.6])),
    )
    assert config_lib.identity(first) == config_lib.identity(second)
    shared = fdl.Config(Optimizer)
    twice = fdl.Config(chain, a=shared, b=shared)
    assert config_lib.identity(twice) == config_lib.identity(fdl.Config(chain, a=Optimizer(), b=Optimizer()))


def test_identity_counts_values_callables_and_the_order_of_a_chain():
    base = {"a": fdl.Config(mechanism), "b": fdl.Config(policy)}
    configs = [
        fdl.Config(chain, **base),
        fdl.Config(chain, b=base["b"], a=base["a"]),
        fdl.Config(chain, a=fdl.Config(mechanism, fraction=1.0), b=base["b"]),
        fdl.Config(chain, a=fdl.Partial(mechanism), b=base["b"]),
        fdl.Config(chain, a=fdl.Config(mechanism), b=fdl.Config(chain)),
    ]
    assert len({config_lib.identity(config) for config in configs}) == len(configs)


def test_identity_refuses_what_has_no_stable_text():
    with pytest.raises(ConfigError, match=r"a: .*<lambda> has no name of its own"):
        config_lib.identity(fdl.Config(chain, a=lambda: 0))
    with pytest.raises(ConfigError, match="b: a set has no stable order"):
        config_lib.identity(fdl.Config(chain, b={"x"}))
    with pytest.raises(ConfigError, match="cannot be hashed"):
        config_lib.identity(fdl.Config(chain, c=object()))


CONFIG = """
    import dataclasses, functools
    import fiddle as fdl
    import sibling_common

    @functools.lru_cache
    def local(rate: float = 0.5):
        return rate

    def get_config():
        join = sibling_common.join
        return fdl.Config(join, x=fdl.Config(local), y=sibling_common.VALUE, z=fdl.Partial(join))
"""
COMMON = "VALUE = {}\ndef join(**parts):\n    return parts\n"


def write_config(folder, value, body=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "sibling_common.py").write_text(COMMON.format(value))
    (folder / "sibling_experiment.py").write_text(textwrap.dedent(body))
    return folder / "sibling_experiment.py"


def test_load_config_finds_siblings_of_its_own_folder(tmp_path):
    first = write_config(tmp_path / "first", 1)
    second = write_config(tmp_path / "second", 2)
    path = list(sys.path)
    assert [config_lib.load_config(p).y for p in (first, second, first)] == [1, 2, 1]
    assert sys.path == path
    assert config_lib.build(config_lib.load_config(second))["x"] == 0.5
    write_config(tmp_path / "second", 2, CONFIG.replace("0.5", "0.75"))
    assert config_lib.build(config_lib.load_config(second))["x"] == 0.75


def test_identity_is_stable_across_processes(tmp_path):
    path = write_config(tmp_path / "configs", "{'b': 1, 'a': 2.5}")
    script = "import sys; from jentropy import config as c; print(c.identity(c.load_config(sys.argv[1])))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", script, str(path)],
            env={"PYTHONHASHSEED": seed},
            cwd=Path(config_lib.__file__).parents[1],
            capture_output=True,
            text=True,
        )
        for seed in ("1", "2")
    ]
    expected = config_lib.identity(config_lib.load_config(path))
    assert [run.stdout.strip() for run in runs] == [expected, expected], runs[0].stderr
    assert len(expected) == 64
    assert json.loads(config_lib.dump(config_lib.load_config(path)))["root"]["type"] == "ref"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", "defines no function get_config"),
        ("def get_config():\n    return {}", "must return an fdl.Config, got dict"),
    ],
)
def test_load_config_reports_what_is_wrong(tmp_path, body, message):
    with pytest.raises(ConfigError, match=message):
        config_lib.load_config(write_config(tmp_path / "bad", 1, body))


def test_load_config_refuses_missing_files_and_taken_names(tmp_path):
    with pytest.raises(ConfigError, match="no such Python file"):
        config_lib.load_config(tmp_path / "absent.py")
    (tmp_path / "json.py").write_text("def get_config(): ...")
    with pytest.raises(ConfigError, match="a module named 'json' is already imported"):
        config_lib.load_config(tmp_path / "json.py")


def test_build_names_the_failing_node():
    config = config_lib.apply_overrides(make(), ["stages.1.optimizer.learning_rate=-1"])
    with pytest.raises(ConfigError, match=r"^stages\.1\.optimizer \(Optimizer\): learning_rate must be positive"):
        config_lib.build(config)
    with pytest.raises(ConfigError, match=r"^a \(Stage\): .*missing 1 required.*'method'"):
        config_lib.build(fdl.Config(chain, a=fdl.Config(Stage)))
    assert config_lib.build(make()).stages[0].method["cov"] == ("mechanism", 2e-4, 3)
