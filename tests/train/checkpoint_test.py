"""Checkpoints: round trip, refusal of what does not fit, other meshes, unwritable folders."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from jentropy.train import checkpoint as checkpoint_lib
from jentropy.train.checkpoint import CheckpointError, Checkpoints, CheckpointWriteError


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array
    counts: dict


def make_state(seed: int = 0) -> State:
    key = jax.random.key(seed)
    params = {"layer": {"w": jax.random.normal(key, (3, 4)), "b": jnp.ones((4,), jnp.bfloat16)}}
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optax.adamw(1e-3).init(params)
    counts = {
        "rollouts": 3,
        "rate": 0.1,
        "on": True,
        "host": np.arange(2),
        "scalar": np.int32(5),
        "none": None,
        "no": {},
    }
    return State(jnp.int32(7), params, opt_state, jax.random.split(key, 3), counts)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        if isinstance(e, jax.Array) and jnp.issubdtype(e.dtype, jax.dtypes.prng_key):
            assert a.dtype == e.dtype
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        assert np.asarray(a).dtype == np.asarray(e).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


def abstract(state):
    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(shape, state)


@pytest.fixture(name="saved", scope="module")
def saved_fixture(tmp_path_factory):
    with Checkpoints(tmp_path_factory.mktemp("run") / "checkpoints") as checkpoints:
        checkpoints.save(4, make_state(), {"offset": 12})
        yield checkpoints


def test_round_trip_into_a_new_manager(tmp_path):
    state = make_state()
    metadata = {"metrics_offset": 123, "config": "ab", "nested": [1, 2.5, None]}
    with Checkpoints(tmp_path / "a" / "b") as checkpoints:
        assert checkpoints.latest_step() is None and checkpoints.latest_metadata() is None
        checkpoints.save(2, state, metadata)
        checkpoints.save(10, make_state(1), {})
    with Checkpoints(tmp_path / "a" / "b") as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.all_steps()) == (10, [2, 10])
        assert checkpoints.latest_metadata() == {}
        restored, found = checkpoints.restore(2, make_state(5))
        assert_same(restored, state)
        assert found == metadata
        assert isinstance(restored.opt_state[0], optax.ScaleByAdamState)
        assert type(restored.counts["rollouts"]) is int and restored.counts["on"] is True
        newest, found = checkpoints.restore(None, abstract(state))
        assert_same(newest, make_state(1))
        assert found == {}


def test_save_and_restore_under_a_transfer_guard(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints, jax.transfer_guard("disallow"):
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, state)
    assert_same(restored, state)


def test_only_the_newest_steps_are_kept(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        for step in range(4):
            checkpoints.save(step, {"x": jnp.zeros(2)}, {})
        checkpoints.wait()
        assert checkpoints.all_steps() == [2, 3]
    with pytest.raises(ValueError, match="max_to_keep must be at least 1 or None, got 0"):
        Checkpoints(tmp_path, max_to_keep=0)


def test_restore_on_another_mesh(tmp_path):
    script = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jentropy.train.checkpoint import Checkpoints
def sharding(n, spec):
    return NamedSharding(jax.make_mesh((n,), ("data",), devices=jax.devices()[:n], axis_types=(AxisType.Auto,)), spec)
x = np.arange(64.0, dtype=np.float32).reshape(8, 8)
pairs = [(8, 1), (1, 8), (8, 4), (2, 8), (8, 8)]
with Checkpoints(sys.argv[1]) as c:
    for step, (old, new) in enumerate(pairs):
        c.save(step, {"x": jax.device_put(x, sharding(old, P("data")))}, {})
        to = sharding(new, P(None, "data"))
        state, _ = c.restore(step, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)})
        assert state["x"].sharding == to
        np.testing.assert_array_equal(np.asarray(state["x"]), x)
print("equal")
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        cwd=Path(checkpoint_lib.__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "equal", run.stderr


def with_w(state, w):
    return state.replace(params={"layer": {**state.params["layer"], "w": w}})


def with_count(state, **counts):
    return state.replace(counts={**state.counts, **counts})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: with_w(s, jnp.zeros((3, 5))), r"float32\[3, 4\] at leaf params/layer/w.* has float32\[3, 5\]"),
        (lambda s: with_w(s, jnp.zeros((3, 4), jnp.bfloat16)), r"float32\[3, 4\] at leaf params/layer/w.*bfloat16"),
        (lambda s: with_count(s, extra=jnp.ones(2)), r"has no leaf counts/extra, where the state has float32\[2\]"),
        (lambda s: s.replace(params={"layer": {"w": s.params["layer"]["w"]}}), r"at leaf params/layer/b.*has nothing"),
        (lambda s: s.replace(key=s.key[:2]), r"key<fry>\[3\] at leaf key, where the state has key<fry>\[2\]"),
        (lambda s: s.replace(key=jax.random.key_data(s.key)), r"key<fry>\[3\] at leaf key.*uint32\[3, 2\]"),
        (lambda s: s.replace(step=7), r"int32\[\] at leaf step, where the state has int"),
        (lambda s: with_count(s, rate=1), r"has float at leaf counts/rate, where the state has int"),
        (lambda s: s.replace(opt_state=s.opt_state[:1]), r"opt_state:"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_by_leaf(saved, change, message):
    with pytest.raises(CheckpointError, match=message):
        saved.restore(4, change(make_state()))


def test_missing_steps_are_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"no step 3 in .*steps there: \[4\]"):
        saved.restore(3, make_state())
    with Checkpoints(tmp_path) as empty, pytest.raises(CheckpointError, match=r"no checkpoint in .*steps there: none"):
        empty.restore(None, make_state())


def test_save_refuses_old_steps_and_what_cannot_be_stored(saved):
    for step in (3, 4):
        with pytest.raises(CheckpointError, match=f"step {step} is not later than step 4"):
            saved.save(step, make_state(), {})
    with pytest.raises(CheckpointError, match="metadata of step 5 is not JSON"):
        saved.save(5, make_state(), {"array": jnp.ones(2)})
    with pytest.raises(CheckpointError, match=r"cannot save step 5.*zero size.*empty"):
        saved.save(5, {"empty": jnp.zeros((0, 2))}, {})
    assert saved.latest_step() == 4


def test_a_failed_or_interrupted_save_leaves_no_step(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="cannot save step 0"):
            checkpoints.save(0, {"text": "no array"}, {})
        (tmp_path / "1.orbax-checkpoint-tmp").mkdir()
        checkpoints.save(1, {"x": jnp.ones(2)}, {})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [1]
        assert checkpoints.restore(None, {"x": jnp.zeros(2)})[0]["x"].tolist() == [1.0, 1.0]


def test_an_unwritable_folder_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointWriteError, match=f"cannot write checkpoints to {file}/run") as error:
        Checkpoints(file / "run")
    assert error.value.exit_code == 74
