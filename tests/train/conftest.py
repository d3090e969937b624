"""Folders of their own for tests that train."""

import pytest
import tiny


@pytest.fixture(scope="session")
def own_folders(tmp_path_factory):
    """Datasets and caches of this session, see `tiny.own_folders`."""
    with tiny.own_folders(tmp_path_factory.getbasetemp()) as base:
        yield base
