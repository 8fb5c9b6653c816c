"""The public names. A change here is a change for users and belongs in CHANGELOG.md."""

from importlib.metadata import version

import graftwork

PUBLIC = ["GraftworkError", "LanguageModel", "Model", "__version__", "apply", "reset", "save"]


def test_public_names() -> None:
    assert sorted(graftwork.__all__) == PUBLIC


def test_public_names_exist() -> None:
    assert [name for name in PUBLIC if not hasattr(graftwork, name)] == []


def test_version_is_that_of_the_distribution() -> None:
    assert graftwork.__version__ == version("graftwork")
