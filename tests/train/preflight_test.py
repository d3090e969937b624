"""Names, folders and room on the disk."""

import errno
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jentropy.train import preflight

BAD = [
    "", ".", "..", ".hidden", "-option", "_x", "a/b", "a\\b", "/etc", "../up", "a/../../b", "x\n", "x\x00", "x y", "é",
    "a" * 101, "~", "$HOME", "a:b", "%2e%2e", "CON ", "x*",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="name must be 1 to 100 letters, digits"):
        preflight.run_folder(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "7", "law_grpo", "a..b", "A-1.2_c", "a" * 100])
def test_good_names_are_folders_of_the_root(name, tmp_path):
    assert preflight.run_folder(tmp_path, name) == tmp_path / name


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="a.-_/\\ \n\x00~é:%", max_size=12))
def test_what_is_accepted_stays_in_the_root(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp().resolve()
    try:
        folder = preflight.run_folder(root, name)
    except ValueError:
        return
    assert folder.resolve().parent == root and folder.name == name


def test_a_folder_that_leads_elsewhere_is_refused(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (root / "run").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"leads out of {root}, to {elsewhere}"):
        preflight.run_folder(root, "run")
    (root / "other").symlink_to(root / "absent")
    with pytest.raises(ValueError, match="leads out of"):
        preflight.run_folder(root, "other")


def test_the_root_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert preflight.run_folder(tmp_path / "runs", "run") == tmp_path / "runs" / "run"


@pytest.mark.parametrize("place", ["metrics.jsonl", "checkpoints", "checkpoints/3/state/d"])
def test_a_link_inside_a_run_folder_is_refused(tmp_path, place):
    path = tmp_path / "run" / place
    path.parent.mkdir(parents=True)
    preflight.check_no_links(tmp_path / "run")
    path.symlink_to(tmp_path)
    with pytest.raises(OSError, match=f"a symbolic link in a run folder: .*{place}"):
        preflight.run_folder(tmp_path, "run")


def test_bytes_of_a_tree():
    tree = {"w": np.zeros((3, 5), np.float32), "flag": np.zeros(7, bool), "n": 1, "x": 0.5, "on": True}
    assert preflight.num_bytes(tree) == 60 + 7 + 24
    shapes = jax.eval_shape(lambda: (jax.numpy.zeros((2, 3), "bfloat16"), jax.random.key(0)))
    assert preflight.num_bytes(shapes) == 12 + 8
    assert preflight.num_bytes((jax.random.key(0), np.float32(1.0))) == 12


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 22_000_000))
    preflight.check_room(tmp_path, 10_000_000)
    with pytest.raises(OSError, match=r"22\.0 MB are free and 22\.0 MB needed, 2\.2 checkpoints of 10\.0 MB") as error:
        preflight.check_room(tmp_path, 10_000_001)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path)


def test_the_real_disk_has_room_for_nothing_and_not_for_everything(tmp_path):
    preflight.check_room(tmp_path, 0)
    with pytest.raises(OSError, match="MB needed"):
        preflight.check_room(tmp_path, 1 << 60)


@pytest.mark.parametrize("module", ["lock", "signals", "watchdog"])
def test_what_guards_a_process_imports_the_standard_library_only(module):
    path = str(preflight.__file__).replace("preflight", module)
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*{name.partition('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-I", "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert not {"jax", "numpy", "jentropy"} & set(found.split())
