"""Two workers are done soonest when what takes longest comes first. Longer tests run with DOMAINMIX_SLOW=1 only."""
import os

import pytest

import forks


os.fsync = lambda fd: None    # the files of a test need not survive a power failure


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a longer test, which runs where DOMAINMIX_SLOW is set")


def pytest_collection_modifyitems(items):
    "Notebooks first, the last of them (runs and companions) before the others."
    longest = [i for i in items if i.nodeid.startswith("tests/test_notebooks.py::test_notebook[")][::-1]
    rest = [i for i in items if i not in longest]
    items[:] = longest + rest
    if not os.environ.get("DOMAINMIX_SLOW"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="a longer test: DOMAINMIX_SLOW=1"))


def pytest_sessionfinish(): forks.close_all()
