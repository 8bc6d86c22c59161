# SPDX-License-Identifier: Apache-2.0
"""What glibc's malloc does with the large blocks that an engine frees.

By default it learns from the first large block that is freed to take later ones of its size, up to 32 MB, from its heap, which
does not shrink while anything lies above. A session that packs its weights frees as much as it keeps: of 3B in w8a8 on a
processor without VNNI, 1.9 GB of 6.2 were such holes.
"""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h's numbers of them
SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def map_blocks(least: int) -> None:
    """Map blocks from `least` bytes on by themselves from now on, so that they go back to the system when they are freed.

    For the whole process. Nothing happens where the C library is not glibc, or where whoever started the process has set its malloc.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in SETTINGS):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, least)
    mallopt(M_TRIM_THRESHOLD, 2 * least)
