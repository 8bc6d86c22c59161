# SPDX-License-Identifier: Apache-2.0
"""Find a checkpoint on disk: the embedded one, a folder, or a repository of the model hub."""

from dataclasses import dataclass
from pathlib import Path

from pgxport.errors import HubError, UsageError
from pgxport.models import tiny
from pgxport.models.spec import SIZES, TINY_RESOLUTIONS, ModelSpec, published

TINY = Path(tiny.__file__).parent
FILES = ["*.json", "*.safetensors"]  # of a repository; everything else in it is not read


@dataclass(frozen=True)
class Located:
    """A checkpoint's folder, a name for people, and the spec that it has to have, where one was asked for."""

    name: str
    path: Path
    spec: ModelSpec | None = None
    masks: Path | None = None  # vae-oid.npz


def locate(size: str | None, res: int | None, family: str, variant: str, checkpoint: str | Path | None) -> Located:
    """Find the checkpoint that the options name.

    Raises:
        UsageError: they name nothing, or what does not exist.
        HubError: it is not on disk, and the hub cannot be reached or refuses.
    """
    if size is not None and size not in SIZES:
        raise UsageError(f"size {size!r} does not exist; choose --size {', '.join(SIZES)}, or a folder with --checkpoint")
    if size == "tiny" and checkpoint is None:
        if res is not None and res not in TINY_RESOLUTIONS:
            raise UsageError(f"the embedded checkpoint has no {res} px; choose --res {' or '.join(map(str, TINY_RESOLUTIONS))}")
        return Located(
            f"tiny-{res or TINY_RESOLUTIONS[0]}", TINY / f"tiny-{res or TINY_RESOLUTIONS[0]}", masks=TINY / "vae-oid.npz"
        )
    if checkpoint is not None:
        folder = Path(checkpoint)
        spec = published(family, size, res) if size in ("3b", "10b", "28b") and res else None
        if not folder.exists() and len(folder.parts) == 2 and not folder.is_absolute():
            return Located(folder.name, _from_hub(str(checkpoint)), spec)
        return Located(folder.resolve().name, folder, spec)
    if size is None:
        raise UsageError("no model was named; pass --size tiny, --size 3b --res 448, or --checkpoint DIR")
    if res is None:
        raise UsageError(f"--size {size} was published at several resolutions; choose --res 224, 448 or 896")
    spec, name = published(family, size, res), f"{family}-{size}-{variant}-{res}"
    return Located(name, _from_hub(f"google/{name}"), spec)


def _from_hub(repository: str) -> Path:
    """The local copy of a repository: the hub cache's if it is there, else downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=FILES))
    except GatedRepoError as error:
        raise HubError(
            f"{repository} is gated: accept its licence on its page, then sign in with `hf auth login` and run this again"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"the hub has no {repository}, or it is private; check the name, or sign in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise HubError(
            f"{repository} is not in the local hub cache and the hub cannot be reached ({type(error).__name__}); "
            f"download it where there is a network (`hf download {repository}`), or pass --checkpoint DIR"
        ) from error
