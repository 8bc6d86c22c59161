# SPDX-License-Identifier: Apache-2.0
"""The doctor believes an engine only once it has run a graph, and advises only what is missing."""

import importlib.metadata
import json
from typing import Any

import pytest

from pgxport import doctor
from pgxport.errors import EngineError
from pgxport.runners.session import open_session


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, to be changed by the test."""
    packages = dict.fromkeys((*doctor.BASE, *(p for extra, _ in doctor.EXTRAS.values() for p in extra)), "1.0")

    def version(package: str) -> str:
        if package not in packages:
            raise importlib.metadata.PackageNotFoundError(package)
        return packages[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return packages


def test_a_complete_installation_needs_no_advice(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "open_session", lambda engine, graph: Engine([42.0]))
    found = doctor.examine()
    assert found["advice"] == []
    assert found["engines"] == {"cpu": {"works": True, "reason": ""}}
    assert doctor.render(found).endswith("try: pgx demo")
    json.dumps(found)


@pytest.mark.parametrize("extra", doctor.EXTRAS)
def test_what_is_missing_is_named_with_the_command_that_installs_it(installed: dict[str, str], extra: str):
    (missing, *_), _ = doctor.EXTRAS[extra]
    del installed[missing]
    found = doctor.examine()
    assert not found["extras"][extra]["complete"]
    assert [f'pip install "pgxport[{extra}]"' in advice for advice in found["advice"]] == [True]
    assert f"{missing} MISSING" in doctor.render(found)


def test_the_gpu_build_serves_the_cpu_too_and_is_not_doubled(installed: dict[str, str]):
    installed["onnxruntime-gpu"] = installed.pop("onnxruntime")
    assert doctor.examine()["advice"] == []


def test_two_builds_of_onnxruntime_are_reported(installed: dict[str, str]):
    installed["onnxruntime-gpu"] = "1.0"
    assert "overwrite each other" in doctor.examine()["advice"][0]


def test_an_engine_that_cannot_open_is_reported_with_its_reason(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    def refuse(engine: str, graph: object) -> None:
        raise EngineError("onnxruntime 1.0 is too old")

    monkeypatch.setattr(doctor, "open_session", refuse)
    found = doctor.examine()
    assert found["engines"]["cpu"] == {"works": False, "reason": "onnxruntime 1.0 is too old"}
    assert "engine cpu: onnxruntime 1.0 is too old" in doctor.render(found)
    assert "pgx demo" not in doctor.render(found).splitlines()[-1]


def test_an_engine_that_computes_something_else_does_not_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "open_session", lambda engine, graph: Engine([41.0]))
    found = doctor.examine()["engines"]["cpu"]
    assert not found["works"]
    assert "41.0" in found["reason"]


def test_the_probe_is_a_graph_that_the_engine_really_runs():
    pytest.importorskip("onnxruntime")
    assert doctor.examine()["engines"]["cpu"]["works"]
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_from_string(doctor.PROBE), full_check=True)


def test_an_onnxruntime_of_another_time_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort, "__version__", "1.20.1")
    with pytest.raises(EngineError, match=r"1\.20\.1 is too old"):
        open_session("cpu", tmp_path / "graph.onnx")


class Engine:
    def __init__(self, gives: list[float]):
        self.gives = gives

    def run(self, feeds: Any) -> Any:
        import numpy as np

        return {"y": np.array(self.gives, np.float32)}

    def close(self) -> None:
        pass
