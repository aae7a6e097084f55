"""Says whether the packages of the extra `curate` are there, before anything imports them."""

from __future__ import annotations

import importlib.util

from data_tools.errors import UsageError

PACKAGES = ("datatrove", "ftfy", "py3langid", "regex", "zstandard", "matplotlib")


def need_packages() -> None:
    """Check that recipes can be run.

    Raises:
        UsageError: a package is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            "an environment with the extra curate",
            "pip install -c constraints.txt -e '.[curate]'",
        )
