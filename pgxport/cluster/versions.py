# SPDX-License-Identifier: Apache-2.0
"""Check that every node has the package versions of this machine, for they may change an answer."""

import importlib.metadata
from collections.abc import Callable, Mapping
from contextlib import suppress

from pgxport.errors import UsageError
from pgxport.machine.conditions import PACKAGES


def survey(packages: tuple[str, ...] = PACKAGES) -> Callable[[], dict[str, str]]:
    """Return a function that lists the installed versions, also on a node without pgxport."""

    # Ray sends a nested function by value, so the node need not import this module.
    def installed() -> dict[str, str]:
        versions = {}
        for package in packages:
            with suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        return versions

    return installed


def check_versions(node: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Check that a node has the versions of this machine.

    Raises:
        UsageError: a package is not the same.
    """
    names = [name for name in PACKAGES if theirs.get(name) != ours.get(name)]
    if names:
        different = ", ".join(f"{name} {theirs.get(name, 'missing')} (here {ours.get(name, 'missing')})" for name in names)
        raise UsageError(f"node {node} has {different}; answers would not be comparable: install the same there")
