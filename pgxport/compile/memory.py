# SPDX-License-Identifier: Apache-2.0
"""Memory that a TensorRT build takes: the estimate, and the refusal where the machine has less."""

from pgxport.bundle.onnx_wire import inner, messages, text_of
from pgxport.bundle.reader import Bundle
from pgxport.errors import NumericError
from pgxport.machine.memory import available_memory
from pgxport.runners.cuda import Cuda
from pgxport.text import size

# Profiles -> anonymous memory of a build, as a multiple of the graph's weights. TensorRT-RTX 1.7 took 2.2
# (int4, one profile), 3.0 (int4, two) and 4.1 (float32, two). Not measured with TensorRT.
COPIES = {1: 2.25, 2: 4.25}
BUILDER_BYTES = 500_000_000  # the builder itself, which takes little, and a reserve
WORKSPACE_BYTES = 1 << 30  # the default of --workspace


def build_memory(weights: int, count: int, workspace: int) -> tuple[int, int]:
    """Bytes that a build of one graph may take of the host, and of the device that kernels are timed on.

    On a board with one memory for both, the build takes the sum.

    Args:
        weights: Bytes of the graph's weights.
        count: Profiles.
        workspace: Bytes of device memory for intermediate results.
    """
    return int(COPIES[count] * weights) + BUILDER_BYTES, weights + workspace


def check_memory(bundle: Bundle, count: int, workspace: int, cuda: Cuda | None) -> None:
    """Refuse a build that would not fit: on a board, running out of memory ends more than this process.

    Args:
        count: Profiles of the decoder.
        workspace: Bytes of device memory for intermediate results.
        cuda: The device that kernels are timed on; None where they are not timed.

    Raises:
        NumericError: the estimate is larger than the free memory.
    """
    weights = max(weight_bytes(bundle, name) for name in bundle.manifest.graphs)  # one is built at a time
    host, device = build_memory(weights, count, workspace)
    device = device if cuda else 0
    sums = f"{COPIES[count]} times the largest graph's {size(weights)} and {size(BUILDER_BYTES)} for the builder"
    if cuda is not None and cuda.attribute("Integrated"):  # the device's memory is the host's
        host, device, sums = host + device, 0, f"{sums}, and the graph once more with {size(workspace)} of workspace"
    shortages = []
    if (free := available_memory()) is not None and host > free:
        shortages.append(f"{size(host)} of memory ({sums}), and {size(free)} are free")
    if cuda is not None and device > (unused := int(cuda.call("cudaMemGetInfo")[0])):
        shortages.append(
            f"{size(device)} on the device (the graph and {size(workspace)} of workspace), and {size(unused)} are free"
        )
    if shortages:
        raise NumericError(
            f"compiling {bundle.path} may take {' and '.join(shortages)}; close other programs, add swap, build with --profiles 1, "
            f"give --workspace fewer MiB, export with a smaller --precision, or pass --force"
        )


def room_for_tactics(cuda: Cuda | None) -> int | None:
    """Bytes that a board has for the kernels that are tried; None elsewhere.

    TensorRT by itself takes up to three quarters of the board's memory, whatever else is in use.
    """
    free = available_memory()
    if cuda is None or free is None or not cuda.attribute("Integrated"):
        return None
    return free - BUILDER_BYTES


def weight_bytes(bundle: Bundle, name: str) -> int:
    """Size of the files that hold a graph's weights."""
    graph = messages("model", memoryview(bundle.graph(name).read_bytes()))
    entries = (entry for kind, fields in graph if kind == "tensor" for entry in inner(fields, 13))
    files = {text_of(entry, 2) for entry in entries if text_of(entry, 1) == "location"}
    return sum(bundle.manifest.files[file].size for file in files)
