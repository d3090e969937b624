"""Checkpoints under faults: damage in files of every class, kill -9 at every point of a save, full disks, versions."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jentropy.train import checkpoint as checkpoint_lib
from jentropy.train import manifest
from jentropy.train.checkpoint import Checkpoints, CheckpointWriteError, CorruptCheckpointError
from jentropy.train.commit import POINTS


def make_state(step):
    return {"layer": {"w": np.full((64,), step, np.float32)}, "count": step}


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step})


def check(checkpoints, step):
    """Step `step` is the newest and holds what it should."""
    assert checkpoints.latest_step() == step
    state, metadata = checkpoints.restore(None, make_state(0))
    np.testing.assert_array_equal(state["layer"]["w"], make_state(step)["layer"]["w"])
    assert state["count"] == step and metadata == {"step": step} == checkpoints.latest_metadata()


@pytest.fixture(name="run", scope="module")
def run_fixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder, identity="ab") as checkpoints:
        save(checkpoints, 1, 2)
    return folder


def files(step):
    return sorted(path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = [flip, truncate, zero, Path.unlink]


def test_the_manifest_says_what_the_step_is(run):
    assert manifest.verify(run / "2") == []
    content = manifest.read(run / "2")
    assert content["leaves"] == {"count": "int", "layer/w": "float32[64]"}
    assert (content["step"], content["identity"]) == (2, "ab")
    assert content["environment"]["devices"].endswith(" cpu")
    assert set(content["files"]) == set(files(run / "2")) - {manifest.NAME}
    classes = {name.rpartition("/")[2] for name in content["files"]}
    assert {"manifest.ocdbt", "_METADATA", "_CHECKPOINT_METADATA", "metadata", "commit_success.txt"} <= classes


def test_damage_in_any_file_is_seen_named_and_survived(run, caplog):
    for name in files(run / "2"):
        path, data = run / "2" / name, (run / "2" / name).read_bytes()
        for damage in DAMAGES:
            damage(path)
            caplog.clear()
            with Checkpoints(run) as checkpoints:
                check(checkpoints, 1)
                with pytest.raises(CorruptCheckpointError, match=r"step 2 in .* is damaged: "):
                    checkpoints.restore(2, make_state(0))
            (record,) = caplog.records
            assert f"is damaged: {name}: " in record.getMessage()
            assert record.getMessage().endswith("Falling back to step 1")
            path.write_bytes(data)
    with Checkpoints(run) as checkpoints:
        check(checkpoints, 2)


def test_strict_refuses_to_fall_back(run):
    path = run / "2" / "state" / "_METADATA"
    data = path.read_bytes()
    flip(path)
    with Checkpoints(run, strict=True) as checkpoints:
        for use in (checkpoints.latest_step, checkpoints.latest_metadata, lambda: checkpoints.restore(None, {})):
            with pytest.raises(CorruptCheckpointError, match=r"step 2 is damaged: state/_METADATA: .*strict") as error:
                use()
        assert error.value.exit_code == 65
        assert checkpoints.restore(1, make_state(0))[1] == {"step": 1}
    path.write_bytes(data)


def test_no_step_that_verifies_is_an_error_and_not_a_new_start(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 2)
        (tmp_path / "1" / manifest.NAME).unlink()
        flip(tmp_path / "2" / "state" / "manifest.ocdbt")
        with pytest.raises(CorruptCheckpointError, match=r"step 2 is .*; step 1 is .*MANIFEST.json: missing.*no step"):
            checkpoints.latest_step()


def test_a_damaged_step_makes_way_for_the_same_step_trained_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 2, 3)
    for step in (2, 3):
        flip(tmp_path / str(step) / "metadata" / "metadata")
    with Checkpoints(tmp_path) as checkpoints:
        check(checkpoints, 1)
        save(checkpoints, 2, 3)
        check(checkpoints, 3)
        assert checkpoints.all_steps() == [1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3", "2.damaged", "3.damaged"}


def test_another_version_is_a_warning(tmp_path, monkeypatch, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        monkeypatch.setattr(manifest, "version", lambda name: "9.9" if name == "jax" else "1.0")
        check(checkpoints, 1)
    assert "(now 9.9)" in caplog.text and "not promised to be bitwise equal" in caplog.text


def test_a_full_disk_costs_the_step_and_nothing_else(tmp_path, monkeypatch):
    real = os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointWriteError, match=r"cannot save step 2 to .*No space left") as error:
            save(checkpoints, 2)
        assert error.value.exit_code == 74
        check(checkpoints, 1)
        monkeypatch.setattr(os, "fsync", real)
        save(checkpoints, 2)
        check(checkpoints, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


CHILD = """
import os, signal, sys
import numpy as np
from jentropy.train.checkpoint import Checkpoints
folder, point, armed = sys.argv[1], sys.argv[2], False
def hook(name):
    if armed and name == point:
        os.kill(os.getpid(), signal.SIGKILL)
with Checkpoints(folder, max_to_keep=2, hook=hook) as checkpoints:
    for step in (1, 2, 3, 4):
        armed = step == 4
        state = {"layer": {"w": np.full((64,), step, np.float32)}, "count": step}
        checkpoints.save(step, state, {"step": step})
"""


@pytest.fixture(name="killed", scope="module")
def killed_fixture(tmp_path_factory):
    """A folder for every point, in which a process was killed there while it saved step 4."""
    folders = {point: tmp_path_factory.mktemp(point) for point in POINTS}

    def kill(point):
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        root = Path(checkpoint_lib.__file__).parents[2]
        command = [sys.executable, "-c", CHILD, str(folders[point]), point]
        return point, subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        for point, run in pool.map(kill, POINTS):
            assert run.returncode == -signal.SIGKILL, f"{point}: {run.stderr}"
    return folders


@pytest.mark.parametrize("point", POINTS)
def test_kill_9_inside_a_save_leaves_the_step_before_or_the_new_one(killed, point, caplog):
    newest = 4 if POINTS.index(point) >= POINTS.index("after-rename") else 3
    with Checkpoints(killed[point], max_to_keep=2, strict=True) as checkpoints:
        check(checkpoints, newest)
        save(checkpoints, newest + 1)
        check(checkpoints, newest + 1)
    assert {path.name for path in killed[point].iterdir()} == {str(newest), str(newest + 1)}
    assert caplog.records == []
