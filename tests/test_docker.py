# SPDX-License-Identifier: Apache-2.0
"""The Dockerfiles, as far as they can be judged without building them."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
INSTRUCTIONS = {
    "FROM", "RUN", "COPY", "ENV", "ARG", "USER", "WORKDIR", "ENTRYPOINT", "CMD", "LABEL", "EXPOSE", "VOLUME", "SHELL", "STOPSIGNAL",
    "HEALTHCHECK", "ADD", "ONBUILD",
}  # fmt: skip
Line = tuple[str, str]

pytestmark = pytest.mark.skipif(not FILES, reason="docker/ is not beside the tests")


def instructions(text: str) -> list[Line]:
    """(instruction, its words), continued lines joined.

    >>> instructions("# a\\nFROM x:1\\nRUN a \\\\\\n  && b")
    [('FROM', 'x:1'), ('RUN', 'a    && b')]
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in joined.splitlines()) if word
    ]


def faults(text: str, context: Path, ignored: list[str]) -> list[str]:
    """What is wrong with a Dockerfile."""
    lines, stages, found = instructions(text), set[str](), []
    for word, rest in lines:
        found += [f"{word} is no instruction"] if word not in INSTRUCTIONS else []
        if word == "FROM":
            image, _, name = re.sub(r"^--platform=\S+\s+", "", rest).partition(" AS ")
            tag = image.rpartition("/")[2].partition(":")[2]
            if image not in stages and (not re.search(r"\d", tag) or "latest" in tag):
                found.append(f"FROM {image}: not pinned to a version")
            stages.add(name.strip())
        if word == "ADD":
            found.append("ADD: use COPY")
        if word == "COPY" and not rest.startswith("--from="):
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            for source in sources:
                if not (context / source).exists():
                    found.append(f"COPY {source}: does not exist")
                elif not passes(source, ignored):
                    found.append(f"COPY {source}: .dockerignore leaves it out")
        if word == "COPY" and (stage := re.match(r"--from=(\S+)", rest)) and stage[1] not in stages:
            found.append(f"COPY --from={stage[1]}: no such stage")
        if word == "RUN":
            found += run_faults(rest)
        if word in ("ENV", "ARG") and re.search(r"(?i)(password|token|secret|api_?key)\w*=\S", rest):
            found.append(f"{word}: a secret")
        if word in ("ENTRYPOINT", "CMD") and not isinstance(json.loads(rest), list):
            found.append(f"{word}: not in the form of a list, so signals do not arrive")
    last = [line for i, line in enumerate(lines) if i > max(n for n, (word, _) in enumerate(lines) if word == "FROM")]
    users = [rest for word, rest in last if word == "USER"]
    if not users or users[-1].partition(":")[0] in ("root", "0"):
        found.append("the last stage runs as root")
    return found


def run_faults(command: str) -> list[str]:
    found = []
    if "apt-get install" in command:
        found += [] if "rm -rf /var/lib/apt/lists/*" in command else ["RUN: apt's lists stay in the layer"]
        found += [] if "--no-install-recommends" in command else ["RUN: apt-get installs what is recommended"]
        found += [] if "apt-get update" in command else ["RUN: apt-get install without update in the same layer"]
    if re.search(r"\bpip3? (install|wheel)\b", command) and "--no-cache-dir" not in command:
        found.append("RUN: pip's cache stays in the layer")
    if re.search(r"(curl|wget)[^|&]*\|\s*(ba)?sh", command) or "sudo " in command:
        found.append("RUN: runs what it downloads, or sudo")
    if "git clone" in command and "--branch" not in command:
        found.append("RUN: git clone of no version")
    return found


def passes(name: str, ignored: list[str]) -> bool:
    """The last pattern that matches counts, as Docker reads .dockerignore."""
    kept = True
    for pattern in ignored:
        if fnmatchcase(name, pattern.lstrip("!")):
            kept = pattern.startswith("!")
    return kept


def ignore_file() -> list[str]:
    return [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_dockerfile_has_no_fault(file: Path):
    assert faults(file.read_text(), ROOT, ignore_file()) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_dockerfile_says_that_nobody_ran_it(file: Path):
    assert "Not run by its authors" in " ".join(file.read_text().replace("#", "").split())


def test_only_the_package_goes_to_the_builder():
    ignored = ignore_file()
    for name in (".git", "benchmarks", "bundle", "tests", ".venv", ".env"):
        assert not passes(name, ignored), name


def test_versions_are_those_of_the_board_table():
    from pgxport.machine.board import SETUPS

    jetpack7 = (ROOT / "docker" / "Dockerfile.jetpack7").read_text()
    rows = {row.name: row for row in SETUPS}
    newest, older = (next(c for c in rows[n].commands if "bindings" in c) for n in ("JetPack 7.2 on Thor", "JetPack 7.0 and 7.1"))
    assert re.search(r"ARG TENSORRT=(\S+)", jetpack7)[1] in newest  # type: ignore[index]
    assert re.search(r"--build-arg TENSORRT=([\d.]+\d)", jetpack7)[1] in older  # type: ignore[index]
    jetpack6 = (ROOT / "docker" / "Dockerfile.jetpack6").read_text()
    assert f"--branch v{rows['JetPack 6.1 and 6.2'].trt}.0 https://github.com/NVIDIA/TensorRT" in jetpack6


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("FROM python\nUSER a", "not pinned"),
        ("FROM python:latest\nUSER a", "not pinned"),
        ("FROM x:1 AS b\nFROM b\nRUN a", "runs as root"),
        ("FROM x:1\nUSER a\nUSER root", "runs as root"),
        ("FROM x:1 AS b\nUSER a\nFROM x:1\nRUN b", "runs as root"),
        ("FROM x:1\nRUN apt-get update && apt-get install --no-install-recommends git\nUSER a", "lists stay"),
        ("FROM x:1\nRUN pip install numpy\nUSER a", "cache stays"),
        ("FROM x:1\nCOPY nothing.txt .\nUSER a", "does not exist"),
        ("FROM x:1\nCOPY tests ./tests\nUSER a", "leaves it out"),
        ("FROM x:1\nCOPY --from=no /a /a\nUSER a", "no such stage"),
        ("FROM x:1\nENV HF_TOKEN=abc\nUSER a", "a secret"),
        ("FROM x:1\nADD http://x /y\nUSER a", "use COPY"),
        ("FROM x:1\nRUN curl https://x | sh\nUSER a", "downloads"),
        ("FROM x:1\nINSTALL x\nUSER a", "no instruction"),
    ],
)
def test_a_planted_fault_is_found(text: str, fault: str):
    assert any(fault in line for line in faults(text, ROOT, ignore_file()))
