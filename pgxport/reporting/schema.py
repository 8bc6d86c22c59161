# SPDX-License-Identifier: Apache-2.0
"""report.json: everything that a report says, and all that its pages are made from.

docs/reference/report.schema.json is written from these classes (python -m pgxport.reporting.schema).
"""

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PICTURE = r"^[0-9a-f]{16}\.webp$"  # a file of the folder pictures/, and nothing else


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Interval(_Model):
    """A value and its 95 % bootstrap interval, which fewer than two pictures do not have."""

    value: float
    low: float | None
    high: float | None


class Change(Interval):
    """Against the reference, on the same samples."""

    verdict: Literal["better", "worse", "inside the noise"]


class Score(_Model):
    """A metric of a task. `decides`: it is the one that counts for the task."""

    task: str
    metric: str
    title: str
    decides: bool
    higher_is_better: bool
    best: float
    samples: int
    result: Interval
    change: Change | None  # None for the reference itself, and where it failed


class Spread(_Model):
    """Percentiles over samples; `low` and `high` are the 95 % interval of the median."""

    p50: float
    p90: float
    p99: float
    low: float | None
    high: float | None
    count: int


class Memory(_Model):
    """Bytes resident: private, mapped files (which the kernel can drop), and both at their highest together."""

    private: int
    mapped: int
    resident: int


class Fidelity(_Model):
    """How close the answers stay to the reference's, whether those are right or not."""

    identical: float  # share of answers with the same tokens
    token_agreement: float  # mean over answers
    first_divergence: float | None  # the median position, of the answers that diverge
    diverged: int
    answers: int
    followed: int = 0  # answers of the reference along which the next tokens were compared
    positions: int = 0
    top1: float | None = None
    kl: float | None = None  # mean over positions, nats
    kl_worst: float | None = None
    kl_located: float | None = None  # among <loc…> and <seg…>, where the reference writes one
    not_compared: str | None = None


class Energy(_Model):
    """Joules an answer, of the whole device."""

    source: str
    joules: Spread


class Rounding(_Model):
    """What the export measured when it rounded this bundle's weights (manifest, `parity`)."""

    positions: int
    kl: float
    agreement: float
    worst: tuple[tuple[str, float], ...]  # weight, SQNR in dB; the ten worst


class Rate(_Model):
    """A second: the median of the repetitions, the least and the most."""

    median: float
    low: float
    high: float


class Batch(_Model):
    """Several answers at a time, of one picture and prompt, each as long as it was told to be."""

    size: int
    images_per_second: Rate
    tokens_per_second: Rate
    peak_resident: int | None  # bytes
    peak_vram: int | None


class Row(_Model):
    """A bundle, or the checkpoint in transformers. With status "failed" the reason says why, and what was measured before is left out."""

    label: str
    name: str
    recipe: str
    target: str
    status: Literal["ok", "failed"]
    reason: str | None = None
    exit_code: int = 0
    digest: str
    bytes: int
    measured: int  # samples, of those asked for
    refused: int = 0
    empty: int = 0
    malformed: int = 0
    truncated: int = 0
    quality: Interval | None = None  # the deciding metrics, each as a share of its best, averaged over tasks
    kept: Interval | None = None  # the quality as a share of the reference's, on the same samples
    scores: tuple[Score, ...] = ()
    fidelity: Fidelity | None = None
    seconds: dict[str, Spread] = Field(default_factory=dict)  # by stage
    tokens_per_second: Spread | None = None
    load_seconds: dict[str, float] = Field(default_factory=dict)
    loaded: Memory | None = None
    peak: Memory | None = None
    peak_vram: int | None = None  # bytes of GPU memory, the most that the process held after an answer; None: not measured
    energy: tuple[Energy, ...] = ()
    batches: tuple[Batch, ...] = ()
    rounding: Rounding | None = None
    notes: tuple[str, ...] = ()


class Pair(_Model):
    """Two rows on the same samples: the second's quality less the first's, and how many times as long it takes."""

    first: str
    second: str
    quality: Interval | None
    latency: Interval | None


class Said(_Model):
    """A row's answer, and the score of it that the task goes by, where a sample has one of its own."""

    label: str
    text: str
    score: float | None
    same: bool  # as the reference's
    fault: str | None = None
    picture: Annotated[str, Field(pattern=PICTURE)] | None = None


class Disagreement(_Model):
    """A sample on which rows differ."""

    sample: str
    task: str
    prompt: str
    truth: str
    metric: str
    picture: Annotated[str, Field(pattern=PICTURE)] | None = None  # with what is true drawn on it
    answers: tuple[Said, ...]


class Finding(_Model):
    """One sentence of the verdict, and what kind it is."""

    kind: Literal["best", "budget", "gate", "no gain", "failed", "noise"]
    text: str


class Data(_Model):
    """What was asked."""

    format: str
    source: str
    digest: str  # of all samples and what is true of them
    samples: int
    tasks: dict[str, int]
    records: int
    skipped: int  # records among those taken that give no sample, unusable ones included
    unusable: int = 0  # records that cannot be used
    remarks: tuple[str, ...] = ()  # the first five of them and why, and what was decided for the data as a whole


class Board(_Model):
    """What a Jetson is set to. None: not told."""

    jetpack: str | None
    l4t: str
    power_mode: str | None  # nvpmodel's, as "25W (1)"
    clocks_held: bool | None  # by jetson_clocks
    gpu_max_mhz: float | None  # in this power mode
    emc_mhz: float | None  # of the memory; root's to read on most systems


class Environment(_Model):
    """What the figures hold for."""

    processor: str
    cores: int | None
    memory_bytes: int | None
    system: str
    engine: str
    threads: int | None
    load_average: float | None
    governor: str | None
    max_mhz: float | None
    energy: tuple[str, ...]  # what it was read from; empty: not measured
    versions: dict[str, str]
    board: Board | None = None  # None: no Jetson
    vectors: str | None = None  # instructions that integers and bfloat16 are multiplied with; None in older reports


class Device(_Model):
    """One pass on one machine."""

    name: str
    command: str
    environment: Environment
    data: Data
    reference: str  # the row's label
    gate: float
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    verdict: tuple[Finding, ...]
    disagreements: tuple[Disagreement, ...]


class Report(_Model):
    """The whole."""

    format_version: Literal[1] = 1
    pgxport: str
    created: str
    devices: tuple[Device, ...]


def schema() -> str:
    """The published JSON schema."""
    document = Report.model_json_schema(mode="serialization")
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **document}, indent=1) + "\n"


if __name__ == "__main__":
    import click

    click.echo(schema(), nl=False)
