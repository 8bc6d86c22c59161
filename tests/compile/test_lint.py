# SPDX-License-Identifier: Apache-2.0
"""The lint refuses graphs that TensorRT would not take; test_tensorrt_builds.py has the rest."""

import importlib.util

import pytest

if not importlib.util.find_spec("onnx"):
    pytest.skip("needs the onnx package to make graphs", allow_module_level=True)

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pgxport.compile.lint import check, check_file, lint
from pgxport.errors import InputError, IntegrityError, UsageError

X, Y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xy")


def graph(*nodes: onnx.NodeProto, opset: int = 20, tensors: tuple[onnx.TensorProto, ...] = (), inputs=(X,)) -> bytes:
    made = helper.make_graph(nodes, "g", inputs, [Y], tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=imports, ir_version=10).SerializeToString()


def node(kind: str, *inputs: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(kind, inputs or ["x"], ["y"], name="the node", **attributes)


def tensor(name: str, kind: int, shape: tuple[int, ...], value: int = 0) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, shape, np.full(shape, value).reshape(-1).tolist())


def codes(kind: int = TensorProto.INT4, rows: int = 64) -> tuple[onnx.TensorProto, ...]:
    return tensor("w", kind, (rows, 32)), numpy_helper.from_array(np.ones((rows // 32, 32), np.float32), "s")


BLOCKS = {"axis": 0, "block_size": 32}
# A name, the graph, the version, the GPU, and what is said of it.
REFUSED = {
    "another engine's operator": (graph(node("MatMulNBits", domain="com.microsoft")), "11", None, "is of com.microsoft.*--target tensorrt"),
    "an operator without importer": (graph(node("DynamicQuantizeLinear")), "11", None, "--precision w8a8 for --target tensorrt"),
    "an operator of later versions": (graph(node("RMSNormalization", "x", "x")), "10.3", None, "is of TensorRT 10.16 and later.*--trt 10.3"),
    "an update of the cache": (graph(node("TensorScatter", "x", "x")), "10.16", None, "is of TensorRT 11 and later"),
    "a younger opset": (graph(node("Relu"), opset=23), "10.3", None, "is of opset 23, and TensorRT 10.3 reads 20"),
    "blocks in a younger opset still": (
        graph(node("DequantizeLinear", "w", "s", **BLOCKS), opset=23, tensors=codes()), "10.3", None, "TensorRT 10.3 reads 21",
    ),
    "rounding to uint8": (graph(node("QuantizeLinear", "x", "x")), "11", None, "has no zero point, which makes it round to uint8"),
    "a zero point of uint8": (
        graph(node("QuantizeLinear", "x", "x", "z"), tensors=(tensor("z", TensorProto.UINT8, ()),)), "11", None, "a zero point of uint8",
    ),
    "a grid off zero": (
        graph(node("QuantizeLinear", "x", "x", "z"), tensors=(tensor("z", TensorProto.INT8, (), 3),)), "11", None, "not the 0 of int8",
    ),
    "zero points of weights": (
        graph(node("DequantizeLinear", "w", "s", "z", **BLOCKS), opset=21, tensors=(*codes(), tensor("z", TensorProto.INT4, (2, 32), 1))),
        "11", None, "has zero points; say symmetric = true",
    ),
    "uint4": (graph(node("DequantizeLinear", "w", "s", **BLOCKS), opset=21, tensors=codes(TensorProto.UINT4)), "11", None, "reads uint4"),
    "4 bits without blocks": (graph(node("DequantizeLinear", "w", "s", axis=0), opset=21, tensors=codes()), "11", None, "without blocks"),
    "blocks of 8 bits, early": (
        graph(node("DequantizeLinear", "w", "s", **BLOCKS), opset=21, tensors=codes(TensorProto.INT8)), "10.3", None, "for int4 alone",
    ),
    "a broken block": (
        graph(node("DequantizeLinear", "w", "s", **BLOCKS), opset=21, tensors=codes(rows=72)), "11", None, "blocks of 32 in 72 channels",
    ),
    "a capped attention": (graph(node("Attention", "x", "x", "x", softcap=50.0), opset=23), "11", None, "has softcap"),
    "a padded attention": (
        graph(node("Attention", "x", "x", "x", "", "", "", "n"), opset=24), "11", None, "has nonpad_kv_seqlen",
    ),
    "FP8 on Orin": (
        graph(node("DequantizeLinear", "w", "s", axis=0), tensors=(tensor("w", TensorProto.FLOAT8E4M3FN, (2, 32)), codes()[1])),
        "10.3", "8.7", "is in float8e4m3, which GPUs have from SM 8.9 on; export with --precision fp16, int8, w8a8 or int4",
    ),
    "bfloat16 on Turing": (graph(node("Cast", to=TensorProto.BFLOAT16)), "11", "7.5", "Cast 'the node' is in bfloat16"),
    "a bfloat16 input": (
        graph(node("Relu"), inputs=(helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [1]),)), "11", "7.5", "the input 'x'",
    ),
    "Volta": (graph(node("Relu")), "11", "7.0", "use a GPU of SM 7.5 or later"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "trt", "sm", "says"), REFUSED.values(), ids=REFUSED)
def test_what_tensorrt_would_not_take_is_refused_with_what_to_do(given, trt, sm, says):
    with pytest.raises(InputError, match=says) as error:
        check("g.onnx", given, trt, sm)
    assert str(error.value).startswith(f"g.onnx is not for TensorRT {trt}")
    assert ";" in str(error.value)


def test_a_branch_is_read_too():
    branch = helper.make_graph([node("DynamicQuantizeLinear")], "b", [], [Y])
    findings = lint("g", graph(helper.make_node("If", ["x"], ["y"], name="outer", then_branch=branch, else_branch=branch)), "11")
    assert [f.operator for f in findings] == ["DynamicQuantizeLinear"] * 2


@pytest.mark.parametrize(
    ("given", "sm"),
    [
        (graph(node("DequantizeLinear", "w", "s", **BLOCKS), opset=21, tensors=codes()), "8.7"),
        (graph(node("QuantizeLinear", "x", "x", "z"), tensors=(tensor("z", TensorProto.FLOAT8E4M3FN, ()),)), "9.0"),
        (graph(node("Cast", to=TensorProto.FLOAT16)), "7.5"),
    ],
)
def test_what_each_version_takes_is_let_through(given, sm, tmp_path):
    (tmp_path / "g.onnx").write_bytes(given)
    for trt in ("10.3", "10.16", "11"):
        check_file(tmp_path / "g.onnx", trt, sm)


def test_a_gpu_younger_than_the_tensorrt_that_is_installed_is_refused():
    with pytest.raises(InputError, match=r"is younger than TensorRT 10\.3\.0; install TensorRT 10\.8 or later"):
        check("g.onnx", graph(node("Relu")), "10.3", "12.0", installed="10.3.0")
    check("g.onnx", graph(node("Relu")), "10.3", "9.0", installed="10.3.0")


def test_graphs_for_10_3_are_for_thor_too_whose_first_jetpacks_have_10_13():
    """docs/jetson.md: JetPack 7.0 and 7.1 take --trt 10.3."""
    check("g.onnx", graph(node("Relu")), "10.3", "11.0")
    check("g.onnx", graph(node("Relu")), "10.3", "11.0", installed="10.13.3.9")


def test_a_gpu_that_cannot_be_read_is_a_usage_error():
    for sm in ("orin", "87", "8", "8.7.1", ""):
        with pytest.raises(UsageError, match="is not a compute capability"):
            lint("g", graph(node("Relu")), "11", sm)


def test_what_is_not_a_graph_is_an_integrity_error():
    with pytest.raises(IntegrityError, match="export the bundle again"):
        lint("g", graph(node("Relu"))[:-3], "11")
