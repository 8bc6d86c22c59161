# SPDX-License-Identifier: Apache-2.0
"""Import a library of the extra `report` where it is used, or say in one line which extra it belongs to."""

import importlib
from typing import Any

from pgxport.errors import UsageError


def require(module: str, what: str) -> Any:
    """The module.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise UsageError(f'{what} needs {module.split(".")[0]}: pip install "pgxport[report]"') from error
