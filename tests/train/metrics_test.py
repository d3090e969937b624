"""Metrics files: exact bytes, resume by truncation, torn lines, TensorBoard events and their failure."""

import errno
import json
import math
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jentropy.train.metrics import MetricsWriter, divide, read_metrics


def read_events(directory):
    """Every event of every file, read by the record format: length, its checksum, data, its checksum."""
    events = []
    for path in sorted(directory.iterdir(), key=lambda p: p.name.rsplit(".", 1)[-1]):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def write_steps(directory, steps, resume_offset=None, resume_step=None):
    """Writes one line of metrics and timing a step; returns the offset after each."""
    offsets = []
    with MetricsWriter(directory, resume_offset, resume_step) as writer:
        for step in steps:
            writer.write(step, {"actor/entropy": 1.0 / (step + 3), "actor/loss": np.float32(0.1) * step})
            writer.write_timing(step, {"seconds": 0.5})
            offsets.append(writer.offset())
    return offsets


def test_divide_leaves_out_what_was_not_counted():
    metrics = {"a": (jnp.float32(3), jnp.int32(4)), "b": (jnp.float32(0), jnp.int32(0)), "c": (5.0, 2)}
    result = divide(metrics)
    assert result == {"a": 0.75, "c": 2.5}
    assert all(type(value) is float for value in result.values())
    assert math.isnan(divide({"n": (jnp.nan, 1)})["n"])


def test_lines_have_sorted_keys_exact_floats_and_no_times(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(3, {"b": 0.1, "a": np.float32(0.1), "n": math.nan, "z": jnp.inf, "stage": "law", "none": None})
        writer.write(4, {"b": jnp.asarray(2, jnp.int32), "m": -math.inf})
        writer.write_timing(4, {"tokens_per_second": 12.5})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text == (
        '{"a": 0.10000000149011612, "b": 0.1, "n": "nan", "none": null, "stage": "law", "step": 3, "z": "inf"}\n'
        '{"b": 2, "m": "-inf", "step": 4}\n'
    )
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["z"] == math.inf and math.isnan(rows[0]["n"]) and rows[0]["stage"] == "law"
    assert rows[1] == {"b": 2, "m": -math.inf, "step": 4}
    assert read_metrics(tmp_path / "run" / "timing.jsonl") == [{"step": 4, "tokens_per_second": 12.5}]


def test_a_resumed_run_writes_the_bytes_of_an_uninterrupted_one(tmp_path):
    write_steps(tmp_path / "whole", range(5))
    offsets = write_steps(tmp_path / "cut", range(4))
    with (tmp_path / "cut" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"actor/ent')
    with (tmp_path / "cut" / "timing.jsonl").open("ab") as file:
        file.write(b'{"seco')
    write_steps(tmp_path / "cut", range(2, 5), resume_offset=offsets[1])
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert [row["step"] for row in read_metrics(tmp_path / "cut" / "timing.jsonl")] == [0, 1, 2, 3, 4]
    assert not list((tmp_path / "cut").glob("*.tmp"))


def test_resume_from_the_beginning_and_in_an_empty_folder(tmp_path):
    write_steps(tmp_path, range(3))
    write_steps(tmp_path, range(1), resume_offset=0)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0]
    assert [row["step"] for row in read_metrics(tmp_path / "timing.jsonl")] == [0]
    assert write_steps(tmp_path / "new", range(2), resume_offset=0)[0] > 0


def test_resume_step_voids_timing_and_events_from_there_on(tmp_path):
    offsets = write_steps(tmp_path, range(4))
    write_steps(tmp_path, [1], resume_offset=offsets[1], resume_step=1)
    assert [row["step"] for row in read_metrics(tmp_path / "timing.jsonl")] == [0, 1]
    events = read_events(tmp_path / "tensorboard")
    assert [e.step for e in events if e.session_log.status == SessionLog.START] == [1]


def test_a_new_run_does_not_overwrite_and_a_lost_file_is_noticed(tmp_path):
    offsets = write_steps(tmp_path, range(2))
    with pytest.raises(FileExistsError, match=r"metrics\.jsonl exists"):
        MetricsWriter(tmp_path)
    for offset in (offsets[-1] + 1, offsets[0] + 1):
        with pytest.raises(ValueError, match=f"no line that ends at byte {offset}"):
            MetricsWriter(tmp_path, offset)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize("tail", [b"", b'{"step": 2', b'{"step": 2, "a": "\xff', b"garbage\n", b"[1]", b"\x00\x00"])
def test_read_metrics_leaves_out_a_torn_last_line(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n' + tail)
    assert [row["step"] for row in read_metrics(path)] == [0, 1]


def test_read_metrics_names_a_bad_line_and_takes_missing_files(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_bytes(b'{"step": 0}\nbroken\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_tensorboard_events_hold_the_numbers_and_mark_a_resume(tmp_path):
    offsets = write_steps(tmp_path, range(3))
    write_steps(tmp_path, [2], resume_offset=offsets[1])
    events = read_events(tmp_path / "tensorboard")
    assert [event.file_version for event in events if event.file_version] == ["brain.Event:2"] * 2
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value if v.tag == "actor/entropy"]
    expected = [(step, "actor/entropy", np.float32(1 / (step + 3))) for step in (0, 1, 2, 2)]
    assert scalars == expected
    assert [e.step for e in events if e.session_log.status == SessionLog.START] == [2]


def test_tensorboard_opens_late(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        assert not (tmp_path / "tensorboard").exists()
        writer.write(0, {"stage": "law"})
        assert (tmp_path / "tensorboard").exists()


def test_failing_tensorboard_warns_once_and_the_run_goes_on(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with MetricsWriter(tmp_path) as writer:
        with pytest.warns(RuntimeWarning, match="TensorBoard events are switched off"):
            writer.write(0, {"a": 1.0})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            writer.write(1, {"a": 2.0})
            writer.write_timing(1, {"seconds": 1.0})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()] == [
        {"a": 1.0, "step": 0},
        {"a": 2.0, "step": 1},
    ]


def test_a_full_disk_names_the_file(tmp_path):
    class Full:
        name = str(tmp_path / "full")

        def close(self, *data):
            raise OSError(errno.ENOSPC, "No space left on device")

        write = flush = close

    writer = MetricsWriter(tmp_path)
    writer._metrics.close()
    writer._metrics = Full()
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/full'"):
        writer.write(0, {"x": 1.0})
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/full'"):
        writer.close()
