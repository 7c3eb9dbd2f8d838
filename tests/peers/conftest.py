"""Everything in this folder compares npattn with libraries of the peers extra, and carries the marker of that name."""

import os
from pathlib import Path

import pytest
from helpers import IMPLEMENTATIONS

from npattn.ops.multihead import IMPLEMENTATIONS as PAIRS

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test downloads anything


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.peers)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 2 queries and 3 keys, so that blockwise needs several at the sizes of these tests, the last one cut short."""
    monkeypatch.setitem(PAIRS, "blockwise", IMPLEMENTATIONS["tiles"])
