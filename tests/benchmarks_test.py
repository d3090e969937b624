"""The benchmarks' own arithmetic: operations counted token by token, CPU time of this process."""

import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest

from jentropy.policy.transformer import TransformerConfig

FOLDER = Path(__file__).parent.parent / "experiments" / "benchmarks"
CONFIG = TransformerConfig(
    vocab_size=11, width=6, num_layers=3, num_heads=4, num_kv_heads=2, head_size=2, mlp_width=5
)  # fmt: skip


@pytest.fixture(scope="module")
def throughput():
    spec = importlib.util.spec_from_file_location("embedded_throughput", FOLDER / "embedded_throughput.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def token(position):
    """Operations of all layers on the token at `position`: projections, MLP, scores and mix over what it sees."""
    weights = 6 * 8 + 2 * 6 * 4 + 8 * 6 + 3 * 6 * 5
    return 3 * (2 * weights + 2 * 2 * 8 * (position + 1))


def test_operations_are_those_of_every_token_that_is_read(throughput):
    lengths = throughput.Lengths(np.array([3, 2]), np.array([[1, 4], [2, 2]]))
    prompts = sum(token(t) for length in (3, 2) for t in range(length))
    decoded = sum(token(t) for t in (3, 4, 5, 2, 2))
    head = 2 * 6 * 11 * (1 + 4 + 2 + 2)
    assert throughput.rollout_flops(CONFIG, lengths) == prompts + decoded + head
    rows = sum(token(t) for length in (3, 6, 3, 3) for t in range(length))
    assert throughput.update_flops(CONFIG, lengths, num_epochs=2) == 3 * 2 * (rows + head)


def test_time_is_that_of_the_process_and_not_of_the_clock(throughput):
    assert throughput.cpu_seconds(lambda: time.sleep(0.02), repeats=2, blocks=3) < 0.01
    assert throughput.matmul_rate(repeats=1) > 1e8
