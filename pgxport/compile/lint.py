# SPDX-License-Identifier: Apache-2.0
"""Name what TensorRT of some version, on a GPU of some compute capability, would not take, and what to do.

Stricter than TensorRT on purpose: operators that pgx does not write are not on the list, though TensorRT
takes some of them. Each table names its sources; docs/reference/tensorrt-dialect.md has them together.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from pgxport.bundle.manifest import TrtVersion
from pgxport.bundle.onnx_wire import Fields, inner, messages, text_of
from pgxport.errors import InputError, IntegrityError, UsageError, choose

VERSIONS: tuple[TrtVersion, ...] = get_args(TrtVersion)  # the oldest first
# Operator -> the first of these versions whose parser has it (onnx-tensorrt: docs/operators.md, changelog).
_ALWAYS = (
    "Add And ArgMax Cast Concat Constant Conv ConvTranspose DequantizeLinear Div Equal Erf Exp Expand Gather Gelu Gemm Greater "
    "Identity If LayerNormalization Less MatMul Max Min Mul Neg Not Or Pow QuantizeLinear ReduceMax ReduceMean ReduceSum "
    "ReduceSumSquare Relu Reshape Shape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where"
)
OPERATORS: dict[str, TrtVersion] = {
    **dict.fromkeys(_ALWAYS.split(), "10.3"),
    # Attention since 10.14, the others since 10.15.
    **dict.fromkeys(("Attention", "RMSNormalization", "RotaryEmbedding"), "10.16"),
    # The parser knows it since 10.15; of the builders tried here only that of 11 took it, updating in place.
    "TensorScatter": "11",
}
# docs/operators.md: "opset 9 to opset 20" in 10.0, "9 to 24" in 10.15. Blocks of 4 bits are of opset 21, and
# the parser has them since 10.0, which was built against ONNX 1.16 (Changelog.md, and NVIDIA/TensorRT issue
# 4298).
OPSETS: dict[TrtVersion, int] = {"10.3": 20, "10.16": 24, "11": 24}
BLOCK_OPSET = 21
REMEDIES = {
    "DynamicQuantizeLinear": "round activations with scales of a calibration: --precision w8a8 for --target tensorrt",
    "MatMulInteger": "write QuantizeLinear and DequantizeLinear: --precision w8a8 for --target tensorrt",
}
# Data types of onnx.TensorProto.
TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 16: "bfloat16",
    17: "float8e4m3", 21: "uint4", 22: "int4", 23: "float4e2m1",
}  # fmt: skip
# Type -> the least compute capability: CUDA's table of arithmetic; ModelOpt's support matrix for INT4
# (Ampere) and FP8 (Ada).
CAPABILITIES = {"bfloat16": (8, 0), "int4": (8, 0), "float8e4m3": (8, 9), "float4e2m1": (10, 0)}
INSTEAD = {
    "bfloat16": "fp16", "int4": "int8", "float8e4m3": "fp16, int8, w8a8 or int4", "float4e2m1": "int4",
}  # fmt: skip
OLDEST = (7, 5)
BLACKWELL, BLACKWELL_SINCE = (10, 0), (10, 8)  # SM; the first TensorRT for it and above


@dataclass(frozen=True)
class LintFinding:
    """One thing that TensorRT would not take: where it is, what it is, and what to do."""

    operator: str
    node: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.operator} {self.node!r} {self.problem}; {self.remedy}"


@dataclass(frozen=True)
class _GraphTensor:
    dtype: str
    shape: tuple[int, ...]
    values: bytes | None  # None: the values are in another file


@dataclass(frozen=True)
class _GraphNode:
    operator: str
    name: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: dict[str, int] = field(default_factory=dict)  # integer attributes
    floats: frozenset[str] = frozenset()  # names of float attributes that are not 0


def check_file(file: Path, version: TrtVersion, sm: str | None = None, *, installed: str | None = None) -> None:
    """Refuse an .onnx file that TensorRT would not take.

    Raises:
        InputError: the graph has something that is not for this version, or not for this GPU.
        IntegrityError: the file is not an ONNX graph.
    """
    check(file.name, file.read_bytes(), version, sm, installed=installed)


def check(name: str, graph: bytes, version: TrtVersion, sm: str | None = None, *, installed: str | None = None) -> None:
    """Refuse a graph in memory, called `name` in messages, that TensorRT would not take; see `check_file`."""
    if findings := lint(name, graph, version, sm, installed=installed):
        more = f" ({len(findings) - 1} more of the kind)" if len(findings) > 1 else ""
        raise InputError(f"{name} is not for TensorRT {version}{f' on SM {sm}' if sm else ''}: {findings[0]}{more}")


def lint(
    name: str, graph: bytes, version: TrtVersion, sm: str | None = None, *, installed: str | None = None
) -> list[LintFinding]:
    """Everything in a graph and its branches that TensorRT of this version would not take.

    Args:
        sm: The GPU's compute capability, as "8.7"; None: any.
        installed: The installed TensorRT, as "10.13.3.9". Every version from 10.3 to before 10.16 takes
            graphs for 10.3.

    Raises:
        IntegrityError: the bytes are not an ONNX graph.
        UsageError: `sm` is not a compute capability.
    """
    choose("trt", version, {v: v for v in VERSIONS})
    capability = _capability(sm)
    try:
        parts = list(messages("model", memoryview(graph)))
        nodes = [_node(fields) for kind, fields in parts if kind == "node"]
        tensors = {text_of(fields, 8): _tensor(fields) for kind, fields in parts if kind == "tensor"}
        opset = max((_int(o, 2) for o in inner(parts[0][1], 8) if not text_of(o, 1)), default=0)
        inputs = {text_of(v, 1): _input_type(v) for kind, fields in parts if kind == "graph" for v in inner(fields, 11)}
    except ValueError as error:
        raise IntegrityError(f"{name}: {error}; export the bundle again, or ask where it comes from") from error
    findings = [*_of_model(name, opset, nodes, version), *_of_gpu(installed, capability)]
    for node in nodes:
        findings += _of_node(node, tensors, version)
    if capability:
        findings += _of_types(nodes, tensors, inputs, capability)
    return findings


def _capability(sm: str | None) -> tuple[int, int] | None:
    """A compute capability as major and minor number.

    >>> _capability("12.1")
    (12, 1)
    """
    if sm is None:
        return None
    if not (match := re.fullmatch(r"([0-9]{1,2})\.([0-9])", sm)):
        raise UsageError(
            f"--sm {sm!r} is not a compute capability; write it with a point, as 8.7 (Orin), 8.9 (Ada) or 11.0 (Thor)"
        )
    return int(match[1]), int(match[2])


def _of_model(name: str, opset: int, nodes: list[_GraphNode], version: TrtVersion) -> Iterator[LintFinding]:
    most = OPSETS[version]
    if any(node.integers.get("block_size") for node in nodes):
        most = max(most, BLOCK_OPSET)
    if opset > most:
        remedy = f"export again with --target tensorrt --trt {version}"
        yield LintFinding("the graph", name, f"is of opset {opset}, and TensorRT {version} reads {most}", remedy)


def _of_gpu(installed: str | None, capability: tuple[int, int] | None) -> Iterator[LintFinding]:
    if capability is None:
        return
    gpu = ".".join(map(str, capability))
    if capability < OLDEST:
        yield LintFinding("the GPU", gpu, "is older than TensorRT 10 knows", "use a GPU of SM 7.5 or later")
    elif installed and capability >= BLACKWELL and tuple(map(int, installed.split(".")[:2])) < BLACKWELL_SINCE:
        least = ".".join(map(str, BLACKWELL_SINCE))
        yield LintFinding("the GPU", gpu, f"is younger than TensorRT {installed}", f"install TensorRT {least} or later")


def _of_node(node: _GraphNode, tensors: dict[str, _GraphTensor], version: TrtVersion) -> Iterator[LintFinding]:
    def finding(problem: str, remedy: str) -> LintFinding:
        return LintFinding(node.operator, node.name, problem, remedy)

    if node.domain:
        yield finding(f"is of {node.domain}, whose operators are other engines'", "export again with --target tensorrt")
        return
    since = OPERATORS.get(node.operator)
    if since is None:
        yield finding(
            "is not an operator that pgx writes for TensorRT", REMEDIES.get(node.operator, "export again with --target tensorrt")
        )
    elif VERSIONS.index(version) < VERSIONS.index(since):
        yield finding(f"is of TensorRT {since} and later", f"export again with --trt {version}")
    rules = {"QuantizeLinear": _of_quantize, "DequantizeLinear": _of_dequantize, "Attention": _of_attention}
    if node.operator in rules:
        for problem, remedy in rules[node.operator](node, tensors, version):
            yield finding(problem, remedy)


def _of_quantize(node: _GraphNode, tensors: dict[str, _GraphTensor], version: TrtVersion) -> Iterator[tuple[str, str]]:
    zero = _third(node, tensors)
    if zero is None:
        yield "has no zero point, which makes it round to uint8", "give it a zero point of int8 or float8e4m3 that is 0"
    elif zero.dtype not in ("int8", "float8e4m3") or any(zero.values or b""):
        yield f"has a zero point of {zero.dtype} that is not the 0 of int8 or float8e4m3", "round on a grid around zero"


def _of_dequantize(node: _GraphNode, tensors: dict[str, _GraphTensor], version: TrtVersion) -> Iterator[tuple[str, str]]:
    zero, quantized = _third(node, tensors), tensors.get(node.inputs[0])
    if zero is not None and (zero.values is None or any(zero.values)):
        yield "has zero points", "say symmetric = true in the recipe, or leave symmetric away"
    if quantized is None:
        return
    if quantized.dtype not in ("int8", "int4", "float8e4m3"):
        yield f"reads {quantized.dtype}", "store int8, int4 or FP8: export again with --target tensorrt"
    block, axis = node.integers.get("block_size", 0), node.integers.get("axis", 1)
    if not block:
        if quantized.dtype == "int4":
            yield "reads int4 without blocks", "store 4 bits with group = 128 in the recipe"
        return
    if version == "10.3" and quantized.dtype != "int4":
        yield f"reads {quantized.dtype} in blocks, which TensorRT 10.3 has for int4 alone", "take group out of the recipe"
    if quantized.shape and quantized.shape[axis] % block:
        yield f"has blocks of {block} in {quantized.shape[axis]} channels", "choose a group that divides the channels"


def _of_attention(node: _GraphNode, tensors: dict[str, _GraphTensor], version: TrtVersion) -> Iterator[tuple[str, str]]:
    """What the parser's Attention lacks (docs/operators.md of 10.15). RTX 1.7 drops nonpad_kv_seqlen."""
    refused = [name for name in ("softcap", "qk_matmul_output_mode") if name in node.floats or node.integers.get(name)]
    refused += [name for name, i in (("past_key", 4), ("past_value", 5), ("nonpad_kv_seqlen", 6)) if any(node.inputs[i : i + 1])]
    refused += ["a second output"] if any(node.outputs[1:]) else []
    if refused:
        yield f"has {', '.join(refused)}", "write the products and the softmax one by one, with an explicit mask"


def _third(node: _GraphNode, tensors: dict[str, _GraphTensor]) -> _GraphTensor | None:
    """The zero point of Q or DQ, its third input; one that the graph computes may be anything but 0."""
    if not any(node.inputs[2:3]):
        return None
    return tensors.get(node.inputs[2], _GraphTensor("a computed type", (), None))


def _of_types(
    nodes: list[_GraphNode], tensors: dict[str, _GraphTensor], inputs: dict[str, str], capability: tuple[int, int]
) -> Iterator[LintFinding]:
    """The first place of each type that the GPU cannot multiply or store."""
    places = [(dtype, "the input", name) for name, dtype in inputs.items()]
    for node in nodes:
        places += [(tensors[i].dtype, node.operator, node.name) for i in node.inputs if i in tensors]
        if node.operator == "Cast":
            places.append((TYPES.get(node.integers.get("to", 0), "?"), "Cast", node.name))
    reported = set()
    for dtype, operator, name in places:
        least = CAPABILITIES.get(dtype)
        if least and capability < least and dtype not in reported:
            reported.add(dtype)
            wants = f"is in {dtype}, which GPUs have from SM {least[0]}.{least[1]} on"
            yield LintFinding(operator, name, wants, f"export with --precision {INSTEAD[dtype]}")


def _node(fields: Fields) -> _GraphNode:
    integers, floats = {}, set()
    for attribute in inner(fields, 5):
        name = text_of(attribute, 1)
        if attribute[3]:
            integers[name] = _signed(_int(attribute, 3))
        if any(attribute[2]) and any(bytes(attribute[2][0]) if isinstance(attribute[2][0], memoryview) else b"\1"):
            floats.add(name)
    inputs, outputs = (tuple(str(bytes(v), "utf-8") for v in fields[n] if isinstance(v, memoryview)) for n in (1, 2))
    return _GraphNode(text_of(fields, 4), text_of(fields, 3), text_of(fields, 7), inputs, outputs, integers, frozenset(floats))


def _tensor(fields: Fields) -> _GraphTensor:
    values = None
    if not fields[13]:
        values = b"".join(bytes(v) for n in (4, 5, 7, 9) for v in fields[n] if isinstance(v, memoryview))
    return _GraphTensor(TYPES.get(_int(fields, 2), "a type of its own"), tuple(_ints(fields, 1)), values)


def _input_type(info: Fields) -> str:
    kinds = [_int(tensor, 1) for t in inner(info, 2) for tensor in inner(t, 1)]
    return TYPES.get(kinds[0], "a type of its own") if kinds else "no tensor"


def _int(fields: Fields, number: int) -> int:
    return next((v for v in fields[number] if isinstance(v, int)), 0)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _ints(fields: Fields, number: int) -> Iterator[int]:
    """Repeated integers, each in a field of its own, or packed into one field, seven bits a byte."""
    for value in fields[number]:
        if isinstance(value, int):
            yield value
            continue
        current = shift = 0
        for byte in bytes(value):
            current |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                yield current
                current = shift = 0
