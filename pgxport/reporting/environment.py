# SPDX-License-Identifier: Apache-2.0
"""The environment that a report's figures hold for: this machine, as it is now."""

import os
from pathlib import Path
from typing import Any

from pgxport.machine.board import ROOT, jetpack, l4t
from pgxport.machine.clocks import Clocks, look, power_mode
from pgxport.machine.energy import find_meters
from pgxport.reporting import schema


def board() -> str | None:
    """Return the board's own name, None where it has none: a processor's name says little of a Jetson."""
    model = Path("/proc/device-tree/model")
    return model.read_text(errors="replace").strip("\0 \n") or None if model.exists() else None


def environment(engine: str, threads: int | None, here: dict[str, Any]) -> schema.Environment:
    """Describe this machine for a report.

    Args:
        here: The result of `describe_machine` before the measuring began.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else None
    clocks, meters = look(), find_meters(engine=engine)
    for meter in meters:
        meter.close()
    return schema.Environment(
        processor=here["processor"],
        vectors=here["vectors"],
        cores=here["cores"],
        memory_bytes=memory,
        system=here["system"],
        engine=engine,
        threads=threads,
        load_average=here["load_average"],
        governor=clocks.governor,
        max_mhz=clocks.max_mhz,
        energy=tuple(meter.source for meter in meters),
        versions=here["versions"],
        board=settings(clocks),
    )


def settings(clocks: Clocks, root: Path = ROOT) -> schema.Board | None:
    """Return the settings of a Jetson; None on another machine."""
    release = l4t(root)
    if release is None:
        return None
    return schema.Board(
        jetpack=jetpack(release),
        l4t=release,
        power_mode=power_mode(root),
        clocks_held=clocks.held,
        gpu_max_mhz=clocks.gpu_max_mhz,
        emc_mhz=clocks.emc_mhz,
    )
