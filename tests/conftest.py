# SPDX-License-Identifier: Apache-2.0
"""What many tests start from: a random checkpoint, its bundle, and the bundles of the embedded checkpoint."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: threads of their own would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in hub layout: a random PaliGemma 2 of odd shapes, and a tokenizer that fits it."""
    reference = pytest.importorskip("reference", reason="needs torch and transformers")
    from gemma_tokenizer import build_tokenizer
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("checkpoint") / "random"
    build_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    image = tokenizer.token_to_id("<image>")
    # More rows than tokens, as in the published checkpoints.
    text = {"vocab_size": tokenizer.get_vocab_size() + 3}
    reference.random_paligemma(folder, family="paligemma2", text=text, image_token_index=image)
    return folder


@pytest.fixture(scope="session")
def random_bundle(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint, exported in float32 for the CPU, with the mask decoder."""
    pytest.importorskip("onnx_ir")
    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions
    from pgxport.hub.locate import TINY

    output = tmp_path_factory.mktemp("bundle") / "random"
    return export(ExportOptions(output=output, checkpoint=random_checkpoint, masks=TINY / "vae-oid.npz")).path


@pytest.fixture(scope="session")
def a_bundle(request: pytest.FixtureRequest) -> Path:
    """Some bundle, for tests that do not mind which: the wheel's environment can make none and is given tiny-112."""
    can_export = all(importlib.util.find_spec(m) for m in ("onnx_ir", "torch", "transformers"))
    return request.getfixturevalue("random_bundle" if can_export else "tiny_112")


@pytest.fixture
def no_entropy_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the search of the entropy observer, which takes half of a calibration's time, where no range of it is looked at."""
    from pgxport.activations import observe

    monkeypatch.setitem(observe.OBSERVER, "entropy", observe.minmax)


@pytest.fixture(scope="session")
def tiny_112(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny(112, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_224(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny(224, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_outliers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Resolution -> the embedded checkpoint with outlier channels, as a folder in hub layout: float32's answers are the same."""
    outliers = pytest.importorskip("tools.tiny.outliers", reason="tools/ is not part of the wheel")
    folder = tmp_path_factory.mktemp("outliers")

    def made(res: int) -> Path:
        output = folder / f"tiny-{res}-outliers"
        return output if output.exists() else outliers.write_outliers(output, res)

    return made


def _tiny(res: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = Path(os.environ.get("PGX_TEST_BUNDLES", "")) / f"tiny-{res}"
    if "PGX_TEST_BUNDLES" in os.environ and given.is_dir():
        return given
    pytest.importorskip("onnx_ir")
    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions
    from pgxport.hub.locate import TINY

    if not (TINY / f"tiny-{res}").is_dir():
        pytest.skip(f"the embedded checkpoint has no tiny-{res} yet")
    return export(ExportOptions(output=tmp_path_factory.mktemp("tiny") / f"tiny-{res}", size="tiny", res=res)).path
