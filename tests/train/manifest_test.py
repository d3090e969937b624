"""Manifests: every change of a folder is seen, and all of it is on the disk before it has its name."""

import json
import os
import shutil

import pytest

from jentropy.train import commit, manifest

FIELDS = {"step": 7, "identity": "ab", "environment": {"jax": "1", "devices": "1 cpu"}, "leaves": {"w": "float32[2]"}}
FILES = {"state/d/0f": b"123456789", "state/_METADATA": b"{}", "empty": b"", "metadata/metadata": b'{"\xc3\xa9": 1}'}


@pytest.fixture(name="step")
def step_fixture(tmp_path):
    folder = tmp_path / "7"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    manifest.write(folder, FIELDS)
    return folder


def test_what_is_written_verifies_and_is_read_again(step):
    assert manifest.verify(step) == []
    content = manifest.read(step)
    assert {name: content[name] for name in FIELDS} == FIELDS
    assert sorted(content["files"]) == sorted(FILES)
    assert content["files"]["state/d/0f"] == {"bytes": 9, "crc32": "cbf43926"}
    assert json.loads((step / manifest.NAME).read_text())["format"] == manifest.FORMAT


@pytest.mark.parametrize("name", [*(name for name in FILES if FILES[name]), manifest.NAME])
def test_every_flipped_bit_is_seen(step, name):
    path, data = step / name, (step / name).read_bytes()
    for bit in range(0, 8 * len(data), 1 if len(data) < 100 else 5):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        (problem,) = manifest.verify(step)
        assert problem.startswith(f"{name}: ")
    path.write_bytes(data)
    assert manifest.verify(step) == []


@pytest.mark.parametrize("name", [*(name for name in FILES if FILES[name]), manifest.NAME])
def test_every_truncation_is_seen(step, name):
    data = (step / name).read_bytes()
    for length in range(len(data)):
        (step / name).write_bytes(data[:length])
        assert [problem.partition(":")[0] for problem in manifest.verify(step)] == [name]


@pytest.mark.parametrize("name", [*FILES, manifest.NAME])
def test_a_missing_file_is_seen(step, name):
    (step / name).unlink()
    assert manifest.verify(step) == [f"{name}: missing"]


def test_a_further_file_is_seen(step):
    (step / "state" / "checkpoint").write_bytes(b"")
    assert manifest.verify(step) == ["state/checkpoint: not in the manifest"]


@pytest.mark.parametrize("name", ["state/d/0f", "state/d"])
def test_links_are_no_files(step, tmp_path, name):
    (step / name).rename(tmp_path / "elsewhere")
    (step / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name}: " in "\n".join(manifest.verify(step))


def test_a_step_under_the_name_of_another_is_seen(step):
    shutil.copytree(step, step.parent / "8")
    assert manifest.verify(step.parent / "8") == ["MANIFEST.json: is that of step 7"]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"null", b"[]", b"{}", b"\xff", b'{"sha256": 1}', b"[" * 100_000, b"1" * 10_000]
)
def test_what_is_no_manifest_is_a_problem(step, data):
    (step / manifest.NAME).write_bytes(data)
    (problem,) = manifest.verify(step)
    assert problem.startswith("MANIFEST.json: is ")


def test_another_format_is_refused(step, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 2)
    assert manifest.verify(step) == ["MANIFEST.json: has format 1, this version of jentropy reads 2"]


def test_a_folder_that_is_not_there(tmp_path):
    assert manifest.verify(tmp_path / "7") == ["MANIFEST.json: missing"]


def test_environments_differ_by_name():
    now = manifest.environment("8 cpu")
    assert set(now) == {*manifest.PACKAGES, "devices"}
    written = {**now, "jax": "0.1", "devices": "1 cpu"}
    assert manifest.differences(now, now) == []
    assert manifest.differences(written, now) == [f"jax 0.1 (now {now['jax']})", "devices 1 cpu (now 8 cpu)"]


def test_all_is_on_the_disk_before_the_rename(step, monkeypatch):
    (step / manifest.NAME).unlink()
    real_fsync, real_rename, events = os.fsync, os.rename, []

    def fsync(handle):
        events.append(os.fstat(handle).st_ino)
        real_fsync(handle)

    def rename(old, new):
        events.append("rename")
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    points = []
    manifest.write(step, FIELDS, points.append)
    commit.commit(step, step.parent / "8", points.append)
    at = events.index("rename")
    everything = [step.parent / "8", *(step.parent / "8").rglob("*")]
    assert {path.stat().st_ino for path in everything} <= set(events[:at])
    assert events[at + 1 :] == [step.parent.stat().st_ino]
    first = commit.POINTS.index("before-manifest")
    assert tuple(points) == commit.POINTS[first : first + len(points)]


def test_old_steps_go_and_half_of_one_is_no_step(tmp_path):
    for step in (3, 20, 100):
        (tmp_path / str(step) / "state").mkdir(parents=True)
    (tmp_path / "010").mkdir()
    (tmp_path / "7").write_text("a file")
    assert commit.list_steps(tmp_path) == [3, 20, 100]
    seen = []
    commit.delete_steps(tmp_path, [3, 20], lambda point: seen.append((point, commit.list_steps(tmp_path))))
    assert seen[1] == ("during-prune", [20, 100]) and seen[-1] == ("after-prune", [100])
    (tmp_path / "5.orbax-checkpoint-tmp-old" / "state").mkdir(parents=True)
    commit.set_aside(tmp_path, 100)
    commit.delete_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["010", "100.damaged", "7"]
