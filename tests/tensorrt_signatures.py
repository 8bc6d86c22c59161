# SPDX-License-Identifier: Apache-2.0
"""Read TensorRT's Python interface from its bindings: classes, methods with their parameters, enumerations.

    pip download --no-deps "tensorrt-cu12-bindings==10.3.0" "tensorrt-cu13-bindings==10.16.1.11" "tensorrt-cu13-bindings==11.4.0.106"
    python tests/tensorrt_signatures.py *.whl              writes goldens/tensorrt-signatures.json

The wheels of bindings lack the libraries: a stand-in with the nine functions that they link to makes them
importable. Needs gcc.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

GOLDEN = Path(__file__).parent / "goldens" / "tensorrt-signatures.json"
CLASSES = (
    "Builder", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "ILogger", "IOptimizationProfile", "IProgressMonitor",
    "IRuntimeConfig", "ITimingCache", "OnnxParser", "ParserError", "Runtime",
)  # fmt: skip
ENUMERATIONS = (
    "BuilderFlag", "CudaGraphStrategy", "DataType", "ExecutionContextAllocationStrategy", "MemoryPoolType", "NetworkDefinitionCreationFlag",
    "TensorIOMode",
)  # fmt: skip
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL", "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip


def signatures(trt: ModuleType) -> dict[str, list[str]]:
    """Class -> its methods, as "set_shape(input, min, opt, max)", a line an overload, and its other names."""
    classes = {}
    for name in CLASSES:
        kind = getattr(trt, name, None)
        if kind is not None:
            members = sorted(member for member in vars(kind) if not member.startswith("_") or member == "__init__")
            classes[name] = [line for member in members for line in _lines(member, getattr(kind, member))]
    return classes | {name: sorted(getattr(trt, name).__members__) for name in ENUMERATIONS if hasattr(trt, name)}


def _lines(name: str, member: object) -> list[str]:
    if not callable(member):
        return [name]
    overloads = re.findall(rf"^(?:\d+\. )?{name}\(self[^,)]*(?:, )?(.*)\)(?: ->.*)?$", member.__doc__ or "", re.MULTILINE)
    return [f"{name}({', '.join(_parameters(text))})" for text in overloads] or [name]


def _parameters(text: str) -> list[str]:
    """
    >>> _parameters("name: str, shape: tuple[int, int], flags: typing.SupportsInt = <Kind.A: 0>")
    ['name', 'shape', 'flags=']
    """
    parameters = re.findall(r"(?:^|, )(\w+): ((?:\[[^]]*\]|[^,\[])*)", text)
    return [name + ("=" if " = " in kind else "") for name, kind in parameters]


def of_wheel(wheel: Path) -> dict[str, list[str]]:
    """Read a wheel in a process of its own: one process cannot load bindings of two versions."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        code = Path(folder) / "empty.c"
        code.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
        for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
            for version in ("10", "11"):
                file = f"lib{library}.so.{version}"
                subprocess.run(["gcc", "-shared", "-fPIC", "-o", f"{folder}/{file}", code, f"-Wl,-soname,{file}"], check=True)
        ask = "import json, tensorrt_bindings as trt; from tensorrt_signatures import signatures; print(json.dumps(signatures(trt)))"
        paths = {"PYTHONPATH": f"{folder}:{Path(__file__).parent}", "LD_LIBRARY_PATH": folder}
        done = subprocess.run([sys.executable, "-c", ask], env=os.environ | paths, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    versions = {wheel.name.split("-")[1]: of_wheel(wheel) for wheel in map(Path, sys.argv[1:])}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(
        json.dumps(dict(sorted(versions.items(), key=lambda item: [int(n) for n in item[0].split(".")])), indent=1) + "\n"
    )
