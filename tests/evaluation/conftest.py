import pytest

from dskd_fast.data.layout import open_category


@pytest.fixture(scope="session")
def category(data_root):
    return open_category(data_root, "screw_bag")


@pytest.fixture
def own_data(own_data):
    """A copy of the category that a test may change."""
    return own_data / "screw_bag"
