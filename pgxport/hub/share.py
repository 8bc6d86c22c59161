# SPDX-License-Identifier: Apache-2.0
"""Bundles on the model hub: `pgx push` verifies one and uploads it in one commit, `pgx pull` fetches one, verifies it, and gives it a name.

Uploads are the hub's library's, which leaves out what the hub has already. Downloads are our own (exporter/hub.py), by range, so
that one that was cut short goes on where it was; every byte is compared with the manifest's digests.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgxport.bundle.manifest import MANIFEST, MAX_MANIFEST_BYTES, FileInfo, Manifest, parse_manifest
from pgxport.bundle.reader import Bundle
from pgxport.bundle.writer import BundleWriter
from pgxport.errors import DiskError, HubError, InputError, IntegrityError, UsageError
from pgxport.files import delete, disk_errors, file_sha256
from pgxport.hub.fetch import TIMEOUT, Blob, Fetch, Progress, blob_of, explained, transport_errors
from pgxport.hub.locate import HUB_ID

MESSAGE = "Upload a bundle with pgx"


@dataclass(frozen=True)
class PushOptions:
    """What to upload. Names are those of `pgx push`'s flags.

    Attributes:
        private: Make the repository private, if it is made now; one that is there stays as it is.
        revision: The branch, made where it is missing; None is the main one.
        dry_run: Verify the bundle and say what would be uploaded, without the network.
    """

    bundle: Path
    repository: str
    private: bool = False
    revision: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class PullOptions:
    """What to fetch. Names are those of `pgx pull`'s flags.

    Attributes:
        output: The folder to write; None names it after the repository.
        revision: A branch, a tag or a commit; None is the main branch.
        dry_run: Ask the hub what there is, and write nothing.
    """

    repository: str
    output: Path | None = None
    revision: str | None = None
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Shared:
    """A bundle in a repository: its files with their bytes, and the commit, where there is one already."""

    repository: str
    commit: str | None
    files: Mapping[str, int]
    path: Path
    url: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "repository": self.repository, "commit": self.commit, "url": self.url, "bundle": str(self.path),
            "bytes": self.nbytes, "files": dict(self.files),
        }  # fmt: skip


def push(options: PushOptions, *, bars: bool = False) -> Shared:
    """Verify a bundle, and upload it in one commit; files that the hub has already are not sent again.

    Args:
        bars: Let the hub's library show its progress.

    Raises:
        IntegrityError: the bundle is not sound, or the hub keeps something else.
        UsageError: it is no name of the hub.
        HubError: the hub cannot be reached, or refuses.
    """
    repository, revision = _repository(options.repository), options.revision or "main"
    bundle = Bundle.open(options.bundle)
    sizes = {MANIFEST: (bundle.path / MANIFEST).stat().st_size}
    sizes |= {name: info.size for name, info in bundle.manifest.files.items()}
    if options.dry_run:
        return Shared(repository, None, sizes, bundle.path)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _quiet(bars=bars), _explained(repository, revision, "push"):
        api.create_repo(repository, private=options.private or None, exist_ok=True)
        if options.revision:
            api.create_branch(repository, branch=options.revision, exist_ok=True)
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=bundle.path / name) for name in sizes]
        try:
            commit = api.create_commit(repository, added, commit_message=MESSAGE, revision=options.revision)
        except ValueError as error:
            raise HubError(f"{repository}: the hub refuses it: {error}") from error
        kept = api.model_info(repository, revision=commit.oid, files_metadata=True, timeout=TIMEOUT).siblings or ()
    _compare(bundle, {sibling.rfilename: blob_of(repository, sibling) for sibling in kept if sibling.rfilename in sizes})
    return Shared(repository, commit.oid, sizes, bundle.path, commit.commit_url)


def pull(options: PullOptions, *, progress: Progress | None = None) -> Shared:
    """Fetch a bundle, verify all of it, and give the folder its name. What was fetched before a failure is used the next time.

    Raises:
        UsageError: the output is there already, or it is no name of the hub.
        InputError: the repository holds no bundle.
        HubError: the hub cannot be reached, or refuses.
        IntegrityError: what is there is not what its manifest promises.
        DiskError: there is no room.
    """
    from huggingface_hub import HfApi, hf_hub_url

    repository, revision = _repository(options.repository), options.revision or "main"
    writer = BundleWriter(options.output or Path(repository.partition("/")[2]), overwrite=options.overwrite, resume=True)
    writer.check_output()
    with _explained(repository, revision, "pull"):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT)
        blobs = {s.rfilename: blob_of(repository, s) for s in info.siblings or () if "/" not in s.rfilename}

        def url(name: str) -> str:
            return hf_hub_url(repository, name, revision=info.sha)

        text = _manifest(repository, revision, blobs, url(MANIFEST))
    manifest = parse_manifest(text, f"{repository}/{MANIFEST}")
    _promised(repository, manifest, blobs)
    sizes = {MANIFEST: len(text)} | {name: file.size for name, file in manifest.files.items()}
    if options.dry_run:
        return Shared(repository, info.sha, sizes, writer.path)
    with writer, disk_errors("cannot write", path=writer.staging), _explained(repository, revision, "pull"):
        _room(writer.staging, manifest)
        fetch = Fetch(progress, sum(file.size for file in manifest.files.values()))
        for name, file in manifest.files.items():
            _fetch(fetch, url(name), writer.staging, Blob(name, file.size, file.sha256), repository)
        writer.write(MANIFEST, [text])
        _sound(writer, repository)
        writer.publish()
    return Shared(repository, info.sha, sizes, writer.path)


def _repository(name: str) -> str:
    found = HUB_ID.fullmatch(name)
    if not found or found[2]:
        raise UsageError(f"{name!r} is no name of a repository; write OWNER/NAME, and a branch or commit with --revision")
    return found[1]


def _manifest(repository: str, revision: str, blobs: Mapping[str, Blob], url: str) -> bytes:
    """The repository's manifest.json, which says what else is to be fetched."""
    if MANIFEST not in blobs:
        there = ", ".join(sorted(blobs)[:5])
        raise InputError(
            f"{repository} holds no bundle at revision {revision!r}: it has no {MANIFEST}, but {there or 'nothing'}; "
            f"a checkpoint is exported with `pgx export --checkpoint {repository}`"
        )
    if (size := blobs[MANIFEST].size) > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{repository}/{MANIFEST} has {size} bytes; no manifest is longer than {MAX_MANIFEST_BYTES}")
    with tempfile.TemporaryDirectory() as folder:
        Fetch(None, size)(url, blobs[MANIFEST], Path(folder) / MANIFEST, repository)
        return (Path(folder) / MANIFEST).read_bytes()


def _promised(repository: str, manifest: Manifest, blobs: Mapping[str, Blob]) -> None:
    """The repository has what its manifest lists, before any of it is fetched."""
    for name, file in manifest.files.items():
        if name not in blobs:
            raise IntegrityError(f"{repository} has no {name}, which its {MANIFEST} lists; ask its owner to push it again")
        if blobs[name].size != file.size or (len(blobs[name].digest) == 64 and blobs[name].digest != file.sha256):
            raise IntegrityError(
                f"{repository}: {name} is not the file that its {MANIFEST} lists; ask its owner to push it again"
            )


def _room(staging: Path, manifest: Manifest) -> None:
    """Sweep away what is not of this bundle, and see that the rest of it has room."""
    digests = [file.sha256 for file in manifest.files.values()]
    names = {*manifest.files, *digests, *(f"{digest}.incomplete" for digest in digests)}
    for left in staging.iterdir():
        if left.name not in names or left.is_symlink() or not left.is_file():
            delete(left)
    missing = sum(file.size for file in manifest.files.values()) - sum(left.stat().st_size for left in staging.iterdir())
    if missing > (free := shutil.disk_usage(staging).free):
        raise DiskError(f"{missing:,} bytes are to be fetched, and {staging.parent} has room for {free:,}; choose another -o")


def _fetch(fetch: Fetch, url: str, staging: Path, blob: Blob, repository: str) -> None:
    file = staging / blob.name
    if file.exists() and file_sha256(file) == blob.digest:
        fetch.skip(blob)
        return
    # While it is on its way it is called after its digest: what is left of it is only ever continued by the same bytes.
    arrived = staging / blob.digest
    fetch(url, blob, arrived, repository)
    with open(arrived, "rb") as opened:
        os.fsync(opened.fileno())
    os.replace(arrived, file)


def _sound(writer: BundleWriter, repository: str) -> None:
    """All of it, as any bundle is verified; what is not sound is not kept."""
    try:
        Bundle.open(writer.staging)
    except IntegrityError as error:
        shutil.rmtree(writer.staging)
        raise IntegrityError(f"{repository} is no sound bundle, and was deleted here: {error}") from error


def _compare(bundle: Bundle, kept: Mapping[str, Blob]) -> None:
    """What the hub keeps is the bundle."""
    files = bundle.manifest.files | {MANIFEST: FileInfo(sha256=file_sha256(bundle.path / MANIFEST), size=0)}
    for name, info in files.items():
        blob = kept.get(name)
        seen = info.sha256 if blob and len(blob.digest) == 64 else blob and _git_digest(bundle.path / name, blob)
        if blob is None or seen != blob.digest:
            what = "does not have" if blob is None else "has another"
            raise IntegrityError(f"after the upload the hub {what} {name}; push again, and do not change the bundle meanwhile")


def _git_digest(file: Path, blob: Blob) -> str:
    """Of a small file, which git names by sha1."""
    content = file.read_bytes()
    digest = Blob(blob.name, len(content), blob.digest).hasher()
    digest.update(content)
    return str(digest.hexdigest())


@contextmanager
def _explained(repository: str, revision: str, command: str) -> Iterator[None]:
    """What the hub's library raises, as an error that says what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    with explained(repository, revision):
        try:
            try:
                yield
            except RuntimeError as error:  # of a thread that uploads a file
                cause = error.__cause__
                if isinstance(cause, HfHubHTTPError | OSError) or (cause and isinstance(cause, transport_errors())):
                    raise cause from error
                raise HubError(f"{repository}: {error}; what was uploaded is kept, run this again") from error
        except OfflineModeIsEnabled as error:
            raise HubError(f"HF_HUB_OFFLINE is set, and pgx {command} needs the hub; unset it") from error
        except transport_errors() as error:
            raise HubError(
                f"{repository}: the hub cannot be reached ({type(error).__name__}); what is there is kept, run this again"
            ) from error
        except HfHubHTTPError as error:
            code = error.response.status_code
            if command == "push" and (code in (401, 403) or isinstance(error, RepositoryNotFoundError)):
                raise HubError(
                    f"the hub lets nobody write to {repository} with these credentials (HTTP {code}); sign in with "
                    f"`hf auth login` and a token that may write, as {repository.partition('/')[0]} or a member of it"
                ) from error
            if isinstance(error, GatedRepoError | RepositoryNotFoundError) or code != 409:
                raise
            raise HubError(f"{repository} was changed by somebody else meanwhile (HTTP 409); run this again") from error


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """The hub's library draws its bars on stderr, even where that is no terminal."""
    from huggingface_hub import utils

    before = utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    if not bars and not before:
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if not bars and not before:
            utils.enable_progress_bars()  # type: ignore[attr-defined]
