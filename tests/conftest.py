"""Two workers are done soonest when what takes longest comes first."""


def pytest_collection_modifyitems(items):
    "Notebooks first, the last of them (runs and companions) before the others."
    longest = [i for i in items if i.nodeid.startswith("tests/test_notebooks.py::test_notebook[")][::-1]
    rest = [i for i in items if i not in longest]
    items[:] = longest + rest
