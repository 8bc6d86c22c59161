# SPDX-License-Identifier: Apache-2.0
"""The calibrator's cache, read back as TensorRT's calibrators write it: a header, then a name and the bits of a float a line."""

import struct

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from in_memory import Observed, Tensors

from pgxport.bundle.reader import Bundle
from pgxport.calib.calibrate import CalibrateOptions, calibrate
from pgxport.exporter.export import ExportOptions, export
from pgxport.exporter.graph import GraphBuilder
from pgxport.exporter.legacy_cache import calibration_cache
from pgxport.exporter.recipe import Recipe, Rule, Scheme
from pgxport.exporter.targets import TENSORRT


@pytest.mark.parametrize(("trt", "version"), [("10.3", "100300"), ("10.16", "101600")])
def test_each_input_of_a_matrix_has_the_step_of_its_range(trt, version):
    w = {f"{part}.weight": np.ones((8, 4), np.float32) for part in "ab"}
    seen = Observed(np.array([[-2.54, 1, 0, 0]], np.float32))
    g = GraphBuilder("g", Tensors(w), Recipe("fp32", (Rule("*", Scheme()),)), TENSORRT[trt], statistics=seen)
    x = g.input("x", ["tokens", 4])
    for part in "ab":
        g.output(g.linear(x, part), part, ["tokens", 8])
    header, *lines = calibration_cache(g, seen).splitlines()
    assert header == f"TRT-{version}-EntropyCalibration2"
    assert len(lines) == 1  # both read one tensor
    name, bits = lines[0].split(": ")
    assert name == "x"
    assert struct.unpack(">f", bytes.fromhex(bits))[0] == pytest.approx(0.02, rel=1e-6)


@pytest.fixture(scope="module")
def calibration_112(tmp_path_factory):
    file = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    calibrate(CalibrateOptions(size="tiny", res=112, samples=1, moments=False, output=file))
    return file


@pytest.mark.parametrize(("trt", "precision", "there"), [("10.3", "fp16", True), ("11", "fp16", False), ("10.3", "w8a8", False)])
def test_a_bundle_of_floats_for_tensorrt_10_carries_them(tmp_path, calibration_112, trt, precision, there):
    bundle = export(
        ExportOptions(
            size="tiny", res=112, target="tensorrt", trt=trt, precision=precision, calibration=calibration_112, parity=0,
            output=tmp_path / "b",
        )
    )  # fmt: skip
    found = {name for name in bundle.manifest.files if name.endswith(".calibration.cache")}
    graphs = {"vision_encoder", "projector", "decoder_step"}
    assert found == ({f"{name}.calibration.cache" for name in graphs} if there else set())
    if (
        there
    ):  # a header; in each layer the inputs of q, k and v, of o, of gate and up, and of down; and that of the output matrix
        layers = bundle.manifest.cache.layers
        assert len((bundle.path / "decoder_step.calibration.cache").read_text().splitlines()) == 1 + 4 * layers + 1
        assert Bundle.open(bundle.path).manifest == bundle.manifest
