# SPDX-License-Identifier: Apache-2.0
"""Fetch a checkpoint's files from the hub's local cache, or download them, resumed where cut short.

Every byte is compared with the digest that the hub names a file by, whether it was downloaded now or before.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgxport.errors import CheckpointError, DiskError, HubError, IntegrityError, UsageError
from pgxport.files import disk_errors
from pgxport.text import listed

FILES = ["*.json", "*.safetensors"]  # at the top of a repository; nothing else in it is read or fetched
SUBFOLDERS = ["*/*"]
TIMEOUT = 30.0  # seconds without a byte
RETRIES = 5  # attempts in a row that bring no byte
CHUNK = 1 << 16  # bytes; a connection that breaks off loses no more

Progress = Callable[[str, int, int], None]  # the file being fetched, bytes so far, bytes in all


@dataclass(frozen=True)
class Blob:
    """A file of a repository, which the hub's cache stores under its digest."""

    name: str
    size: int
    digest: str  # sha256 of large files, git's blob id (sha1) of small ones

    def hasher(self) -> Any:
        """A hashlib object for this file's kind of digest, into which the content goes."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        # Not for security: the digests that have to resist forgery, those of the weights, are sha256.
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


def cached(repository: str, revision: str) -> Path | None:
    """The folder of a complete copy in the local cache, compared with its digests; None where there is none.

    Raises:
        IntegrityError: a file of the copy was changed.
        UsageError: `repository` is no name of the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=FILES, ignore_patterns=SUBFOLDERS, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UsageError(f"there is no folder {repository}, and it is not a name of the hub either: {error}") from error
    if not _complete(folder):
        return None
    for file in sorted(folder.iterdir()):
        blob = file.resolve()
        # On a system without links the cache holds plain files, and their digests are stored nowhere.
        if file.is_symlink() and len(blob.name) in (40, 64):
            _verify(file, Blob(file.name, blob.stat().st_size, blob.name), repository)
    return folder


def download(repository: str, revision: str, progress: Progress | None = None) -> Path:
    """Fetch a repository's files into the local cache, and return their folder.

    Raises:
        HubError: the hub cannot be reached, or refuses.
        CheckpointError: the repository has no safetensors.
        IntegrityError: a file that arrived has another digest than the hub says; it is deleted.
        DiskError: there is no room.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    with explained(repository, revision):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT)
    blobs = [blob_of(repository, sibling) for sibling in info.siblings or () if _wanted(sibling.rfilename)]
    if not any(blob.name.endswith(".safetensors") for blob in blobs):
        names = listed(sorted(s.rfilename for s in info.siblings or ()))
        raise CheckpointError(
            f"{repository} has no safetensors at revision {revision!r} (it holds {names or 'nothing'}); name another"
        )
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    home = f"models--{repository.replace('/', '--')}"
    fetch = Fetch(progress, sum(blob.size for blob in blobs))
    with (
        disk_errors(f"cannot write to the hub's cache {cache}", "free some space, or set HF_HOME"),
        explained(repository, revision),
    ):
        (cache / home / "blobs").mkdir(parents=True, exist_ok=True)
        (cache / ".locks" / home).mkdir(parents=True, exist_ok=True)
        missing = sum(blob.size for blob in blobs if not (cache / home / "blobs" / blob.digest).exists())
        if missing > (free := shutil.disk_usage(cache).free):
            raise DiskError(
                f"{repository} takes {missing:,} bytes more in {cache}, which has room for {free:,}; free some, or set HF_HOME"
            )
        for blob in blobs:
            # The hub library's lock and names, so that its other users and pgx share downloads.
            with WeakFileLock(cache / ".locks" / home / f"{blob.digest}.lock"):
                url = hf_hub_url(repository, blob.name, revision=info.sha)
                fetch(url, blob, cache / home / "blobs" / blob.digest, repository)
        # All bytes are in the cache; this makes the links and the names.
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=FILES, ignore_patterns=SUBFOLDERS, tqdm_class=_without_bars()
            )
        )
        for blob in blobs:
            if (folder / blob.name).resolve().name != blob.digest:
                _verify(folder / blob.name, blob, repository)
    return folder


class Fetch:
    """Downloads blobs one after the other, and reports the progress of all of them together."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._before = progress, total, 0

    def __call__(self, url: str, blob: Blob, target: Path, repository: str) -> None:
        """Download a blob to `target`, or verify the one that is there.

        Raises:
            IntegrityError: its digest is another.
            HubError: the connection breaks off again and again.
        """
        if target.exists():
            _verify(target, blob, repository)
        else:
            partial = target.with_name(f"{target.name}.incomplete")
            digest = self._stream(url, blob, partial, repository)
            if digest != blob.digest:
                partial.unlink()
                raise IntegrityError(
                    f"{repository}: {blob.name} arrived damaged: its digest begins {digest[:12]}, the hub says {blob.digest[:12]}; "
                    f"it was deleted, run this again"
                )
            os.replace(partial, target)
        self._before += blob.size

    def skip(self, blob: Blob) -> None:
        """Count a blob that was downloaded before."""
        self._before += blob.size

    def _stream(self, url: str, blob: Blob, partial: Path, repository: str) -> str:
        """Append the missing bytes to `partial`, and return the digest of the whole."""
        from huggingface_hub import get_session, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        with open(partial, "ab+", buffering=0) as file:
            digest, length = _resume(file, blob)
            tries = 0
            while length < blob.size:
                # Not compressed, so that a range counts the file's own bytes.
                headers = {**build_hf_headers(), "Range": f"bytes={length}-", "Accept-Encoding": "identity"}
                tries += 1
                try:
                    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
                        hf_raise_for_status(response)
                        if response.status_code != 206 and length:
                            file.truncate(0)
                            digest, length = blob.hasher(), 0
                        for chunk in response.iter_bytes(CHUNK):
                            if length + len(chunk) > blob.size:
                                raise IntegrityError(
                                    f"{repository}: the hub sends more of {blob.name} than the {blob.size:,} bytes it lists"
                                )
                            file.write(chunk)
                            digest.update(chunk)
                            length += len(chunk)
                            tries = 0
                            if self._progress:
                                self._progress(blob.name, self._before + length, self._total)
                except transport_errors() as error:
                    if tries >= RETRIES:
                        raise HubError(
                            f"{repository}: the connection broke off at {length:,} of {blob.size:,} bytes of {blob.name} "
                            f"({type(error).__name__}); what was fetched is kept; run this again to go on from it"
                        ) from error
                    time.sleep(min(1.0, 0.1 * 2**tries))
            return str(digest.hexdigest())


def _resume(file: Any, blob: Blob) -> tuple[Any, int]:
    """Hash what an earlier download wrote; return the hasher and the length, with the file at its end."""
    digest = blob.hasher()
    if file.seek(0, os.SEEK_END) > blob.size:
        file.truncate(0)
    file.seek(0)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest, file.tell()


def _verify(file: Path, blob: Blob, repository: str) -> None:
    """Compare a file of the cache with its digest.

    Raises:
        IntegrityError: they differ.
    """
    digest = blob.hasher()
    with open(file, "rb", buffering=0) as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != blob.digest:
        raise IntegrityError(
            f"{file.resolve()}: {blob.name} of {repository} was changed in the local cache: its digest begins "
            f"{digest.hexdigest()[:12]}, the hub says {blob.digest[:12]}; delete this file and run this again"
        )


def _complete(folder: Path) -> bool:
    """Whether the folder has every file of a checkpoint; after a download that was cut short it has not."""
    needed: list[Any] = ["config.json", "tokenizer.json", "model.safetensors"]
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        needed = [*needed[:2], *index["weight_map"].values()]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(isinstance(name, str) and Path(name).name == name and (folder / name).is_file() for name in set(needed))


def _without_bars() -> Any:
    """A silent progress bar for the hub's library, whose own writes even where stderr is no terminal."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return Silent


def _wanted(name: str) -> bool:
    """Whether a file of a repository belongs to a checkpoint (FILES)."""
    return "/" not in name and "\\" not in name and name.endswith((".json", ".safetensors"))


def blob_of(repository: str, sibling: Any) -> Blob:
    """A file of a repository, as the hub lists it.

    Raises:
        HubError: the hub does not list its size or its digest.
    """
    size = sibling.lfs.size if sibling.lfs else sibling.size
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if not isinstance(size, int) or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(digest)):
        raise HubError(f"{repository}: the hub does not say how large {sibling.rfilename} is, or its digest; nothing was fetched")
    return Blob(sibling.rfilename, size, digest)


def transport_errors() -> tuple[type[Exception], ...]:
    """The errors of a broken connection; huggingface_hub uses httpx2 since version 2, httpx before."""
    try:
        import httpx2 as httpx
    except ImportError:
        import httpx  # type: ignore[import-not-found, no-redef]
    return (httpx.TransportError,)


@contextmanager
def explained(repository: str, revision: str) -> Iterator[None]:
    """Turn an error of the hub's library into one of ours that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unreachable: tuple[type[Exception], ...] = (LocalEntryNotFoundError, *transport_errors())
    by_hand = f"`hf download {repository} --revision {revision}` where there is a network, or --checkpoint DIR"
    try:
        yield
    except GatedRepoError as error:
        if error.response.status_code == 401:
            todo = "sign in with `hf auth login` as someone who has accepted its licence"
        else:
            todo = "accept its licence on its page of the hub, with the account you are signed in as"
        raise HubError(f"{repository} is gated: {todo}, and run this again") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"the hub has no {repository}, or it is private; check the name, or sign in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repository} has no revision {revision!r}; its page on the hub lists them") from error
    except HFValidationError as error:
        raise UsageError(f"there is no folder {repository}, and it is not a name of the hub either: {error}") from error
    except OfflineModeIsEnabled as error:
        raise HubError(
            f"{repository} is not in the local hub cache, or not whole, and HF_HUB_OFFLINE is set; unset it, or use {by_hand}"
        ) from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        todo = "sign in again with `hf auth login`" if code in (401, 403) else "try again later"
        raise HubError(f"{repository}: the hub answers with HTTP {code}; {todo}") from error
    except unreachable as error:
        raise HubError(
            f"{repository} is no folder here, is not in the local hub cache, and the hub cannot be reached "
            f"({type(error).__name__}); use {by_hand}"
        ) from error
