"""Skip what needs the null device where it is not."""

from pathlib import Path

import pytest

from nullcuda.launch import is_preloaded

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Skip this folder's tests in a process that was started without the library."""
    skip = pytest.mark.skip(reason="needs the GPU that computes nothing: make nullcuda")
    values = pytest.mark.filterwarnings("ignore::ununennium.TrainingWarning")  # they are no numbers
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(values if is_preloaded() else skip)
