import shutil

import pytest

from dskd_fast.data.layout import open_category

# Markup that would be executed, quotes and other scripts.
NASTY = ["\"><img src=x onerror=alert(1)>'ü漢.png", "<svg onload=alert(1)>&lt;b&gt;.png", "`${alert(1)}`\\.png"]


@pytest.fixture
def own_data(own_data):
    """A copy of the category that a test may change."""
    return own_data / "screw_bag"


@pytest.fixture(scope="session")
def nasty_names(data_root, tmp_path_factory):
    """Copies the category, with other names for its good test images: nasty_names(more names) -> the category."""

    def copy(*more):
        root = shutil.copytree(data_root / "screw_bag", tmp_path_factory.mktemp("nasty") / "screw_bag")
        for path, name in zip(sorted((root / "test" / "good").iterdir()), [*more, *NASTY], strict=False):
            path.rename(path.with_name(name))
        return open_category(root, None)

    return copy
