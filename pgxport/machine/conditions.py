# SPDX-License-Identifier: Apache-2.0
"""The conditions that figures hold for: processor, system, load, and the versions of packages."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from typing import Any

from pgxport.machine.cpu import processor_name, usable_cores, vectors

PACKAGES = ("pgxport", "numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "tokenizers")


def describe_machine() -> dict[str, Any]:
    """The machine as plain data, for the JSON of what is measured on it."""
    return {
        "processor": processor_name(),
        "vectors": vectors(),
        "cores": usable_cores(),
        "system": platform.platform(),
        "load_average": round(os.getloadavg()[0], 2),  # before; other work makes all of it doubtful
        "versions": {"python": platform.python_version()} | versions(PACKAGES),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    installed = {}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
