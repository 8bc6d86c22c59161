# SPDX-License-Identifier: Apache-2.0
"""Find a checkpoint: the embedded one, a folder, or one that was published on the model hub."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pgxport.errors import UsageError
from pgxport.hub import fetch as hub
from pgxport.models import tiny
from pgxport.models.lora import read_adapter_config
from pgxport.models.spec import RESOLUTIONS, SIZES, TINY_RESOLUTIONS, ModelSpec, published

TINY = Path(tiny.__file__).parent
HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w.][\w./-]*))?")
MIX_RESOLUTIONS = (224, 448)
# Of PaliGemma 1 some fifty fine-tunes were published, of PaliGemma 2 these.
FINE_TUNES = {("paligemma2", "3b"): ("ft-docci", 448), ("paligemma2", "10b"): ("ft-docci", 448)}
License = Literal["apache-2.0", "gemma"]
TASK = re.compile(r"ft-[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """The model that a command works on, called as its flags.

    Attributes:
        size: A published size, or "tiny" for the embedded checkpoint; None where `checkpoint` says all.
        res: Pixels a side.
        variant: "pt", "mix" or "ft-TASK", as the hub names them.
        checkpoint: A folder in hub layout, or a hub id, which @REVISION may follow.
        adapter: The folder of a PEFT adapter, merged into the checkpoint as it is read; or several, merged one after the
            other. Without `checkpoint` and `size`, the base that the first one names is the checkpoint.
        masks: `vae-oid.npz`, for the mask decoder; the embedded checkpoint brings its own.
    """

    size: str | None = None
    res: int | None = None
    family: str = "paligemma2"
    variant: str = "pt"
    checkpoint: str | Path | None = None
    adapter: str | Path | Sequence[str | Path] | None = None
    masks: str | Path | None = None

    @property
    def adapters(self) -> tuple[Path, ...]:
        """The folders of the adapters, in the order in which they are merged."""
        one = isinstance(self.adapter, str | Path)
        return tuple(map(Path, (self.adapter,) if one else self.adapter or ()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Located:
    """A checkpoint's folder, a name for people, and the spec that it must have, if the options name one."""

    name: str
    path: Path
    spec: ModelSpec | None = None
    masks: Path | None = None  # vae-oid.npz
    revision: str | None = None  # the hub's commit
    repository: str | None = None  # and its name there
    license: License | None = None  # the hub's name of it; None: not known
    notes: tuple[str, ...] = ()  # what someone should know about the choice, as sentences


def locate(choice: ModelChoice, *, precision: str | None = None, progress: hub.Progress | None = None) -> Located:
    """Find the checkpoint of a model.

    Args:
        precision: The precision to export, which chooses among the revisions of a published model.

    Raises:
        UsageError: the choice names no model, or one that does not exist.
        HubError: the model is not on disk, and the hub cannot be reached or refuses.
        IntegrityError: a local or downloaded file has another digest than the hub says.
    """
    if choice.checkpoint is None and choice.size is None and choice.adapters:
        return _with_notes(_base_of(choice.adapters[0], progress), choice.adapters)
    return _with_notes(_named(choice, precision, progress), choice.adapters)


def _named(choice: ModelChoice, precision: str | None, progress: hub.Progress | None) -> Located:
    size, res, family, checkpoint = choice.size, choice.res, choice.family, choice.checkpoint
    if size is not None and size not in SIZES:
        raise UsageError(f"size {size!r} does not exist; choose --size {', '.join(SIZES)}, or a folder with --checkpoint")
    if size == "tiny" and checkpoint is None:
        if res is not None and res not in TINY_RESOLUTIONS:
            raise UsageError(f"the embedded checkpoint has no {res} px; choose --res {' or '.join(map(str, TINY_RESOLUTIONS))}")
        name = f"tiny-{res or TINY_RESOLUTIONS[0]}"
        return Located(name, TINY / name, masks=TINY / "vae-oid.npz", license="apache-2.0")
    if checkpoint is not None:
        folder = Path(checkpoint)
        spec = published(family, size, res) if size in ("3b", "10b", "28b") and res else None
        if not folder.exists() and (named := HUB_ID.fullmatch(str(checkpoint))):
            repository, revision = named.groups()
            return _from_hub(repository, [revision or "main"], spec, progress)
        return Located(folder.resolve().name, folder, spec)
    if size is None:
        raise UsageError("no model was named; pass --size tiny, --size 3b --res 448, --checkpoint DIR, or --adapter DIR")
    if res is None:
        raise UsageError(f"--size {size} was published at several resolutions; choose --res 224, 448 or 896")
    spec = published(family, size, res)
    name = published_name(family, size, res, choice.variant)
    return _from_hub(f"google/{name}", revisions(family, precision), spec, progress)


def _base_of(adapter: Path, progress: hub.Progress | None) -> Located:
    """The base that an adapter names: a folder, from the working directory on as in PEFT, or a hub id."""
    config = read_adapter_config(adapter)
    base = config.base_model_name_or_path
    if not base:
        raise UsageError(f"{adapter} does not name the model that it was trained on; pass that with --checkpoint")
    if not os.path.exists(base):  # unlike Path's, False for what can be no path
        if not HUB_ID.fullmatch(base):
            raise UsageError(f"{adapter} was trained on {base!r:.200}, which is not here; pass that model with --checkpoint")
        return _from_hub(base, [config.revision or "main"], None, progress)
    return Located(Path(base).resolve().name, Path(base))


def _with_notes(found: Located, adapters: Sequence[Path]) -> Located:
    """Adds a sentence for each adapter that names another base: by its hub id, its path, or the last part of one."""
    notes = []
    for adapter in adapters:
        base = read_adapter_config(adapter).base_model_name_or_path
        here = {found.name, found.path.resolve().name, found.repository}
        same = base and os.path.exists(base) and os.path.samefile(base, found.path)
        if base and not same and not {base, Path(base).name} & here:
            notes.append(f"{adapter} was trained on {base!r:.200}, and is merged into {str(found.repository or found.path)!r}")
    return replace(found, notes=tuple(notes))


def published_name(family: str, size: str, res: int, variant: str) -> str:
    """The hub's name of a published model, without its owner.

    >>> published_name("paligemma2", "10b", 448, "ft-docci")
    'paligemma2-10b-ft-docci-448'

    Raises:
        UsageError: the variant was not published at this size and resolution.
    """
    task, task_res = FINE_TUNES.get((family, size), (None, None))
    variants = {"pt": RESOLUTIONS, "mix": MIX_RESOLUTIONS} | ({task: (task_res,)} if task else {})
    if res in variants.get(variant, ()) or (family == "paligemma" and TASK.fullmatch(variant)):
        return f"{family}-{size}-{variant}-{res}"
    listed = ", ".join(f"{v} at {'/'.join(map(str, sizes))}" for v, sizes in variants.items())
    tasks = ", and fine-tunes as ft-TASK (for example ft-docvqa at 896)" if family == "paligemma" else ""
    raise UsageError(f"no {family} {size} {variant!r} at {res} px was published; there are: {listed}{tasks}")


def revisions(family: str, precision: str | None) -> list[str]:
    """The branches whose weights suit a precision; the first is the one to download.

    PaliGemma 1 was published in float32 (main), bfloat16 and float16; PaliGemma 2 in bfloat16 alone. A bf16
    export rounds to bfloat16 anyway, so half the bytes give the same bundle. All other precisions begin from
    float32: weights in bfloat16 would be rounded twice.
    """
    return ["bfloat16", "main"] if family == "paligemma" and precision == "bf16" else ["main"]


def _from_hub(repository: str, branches: list[str], spec: ModelSpec | None, progress: hub.Progress | None) -> Located:
    """The local copy of a repository: the hub cache's if it has one, else a download."""
    copy = next((folder for branch in branches if (folder := hub.cached(repository, branch))), None)
    folder = copy or hub.download(repository, branches[0], progress)
    owner, _, name = repository.partition("/")
    license: License | None = "gemma" if owner == "google" else None
    return Located(name, folder, spec, revision=folder.name, repository=repository, license=license)
