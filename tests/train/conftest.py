"""Folders of their own for tests that train."""

import pytest
import tiny

from jentropy.train import loop


@pytest.fixture(scope="session")
def own_folders(tmp_path_factory):
    """Datasets and caches of this session, see `tiny.own_folders`."""
    with tiny.own_folders(tmp_path_factory.getbasetemp()) as base:
        yield base


@pytest.fixture(scope="session")
def kept_run(own_folders, tmp_path_factory):
    """The folder of a run that has kept rollouts, see `tiny.keeping`; not to be changed."""
    out = tmp_path_factory.mktemp("kept") / "run"
    loop.train(tiny.keeping(), out, quiet=True)
    return out
