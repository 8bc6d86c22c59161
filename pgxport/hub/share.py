# SPDX-License-Identifier: Apache-2.0
"""Exchange bundles with the model hub: push verifies and uploads one, pull fetches and verifies one.

The hub's library uploads in one commit, and leaves out files that the hub has already. Downloads are
hub/fetch.py's, by range, so that one that was cut short goes on where it was; every byte is compared with the
manifest's digests.
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
from pgxport.text import listed

MESSAGE = "Upload a bundle with pgx"


@dataclass(frozen=True)
class PushOptions:
    """The bundle to upload, and where to. Names are those of `pgx push`'s flags.

    Attributes:
        private: Make the repository private, if it is made now; an existing one stays as it is.
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
    """The bundle to fetch, and where to. Names are those of `pgx pull`'s flags.

    Attributes:
        output: The folder to write; None names it after the repository.
        revision: A branch, a tag or a commit; None is the main branch.
        dry_run: Read the hub's list of files, and write nothing.
    """

    repository: str
    output: Path | None = None
    revision: str | None = None
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Shared:
    """A bundle in a repository: its files with their bytes, and the commit, once there is one."""

    repository: str
    commit: str | None
    files: Mapping[str, int]
    path: Path
    url: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def to_json(self) -> dict[str, Any]:
        """The repository, the commit and the files as plain data."""
        return {
            "repository": self.repository, "commit": self.commit, "url": self.url, "bundle": str(self.path),
            "bytes": self.nbytes, "files": dict(self.files),
        }  # fmt: skip


def push(options: PushOptions, *, bars: bool = False) -> Shared:
    """Verify a bundle, and upload it in one commit; files that the hub has already are not sent again.

    Args:
        bars: Whether the hub's library shows its progress bars.

    Raises:
        IntegrityError: the bundle is not sound, or the hub has other bytes after the upload.
        UsageError: `repository` is no name of the hub.
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
            raise HubError(f"{repository}: the hub refuses the commit: {error}") from error
        siblings = api.model_info(repository, revision=commit.oid, files_metadata=True, timeout=TIMEOUT).siblings or ()
    _compare(bundle, {s.rfilename: blob_of(repository, s) for s in siblings if s.rfilename in sizes})
    return Shared(repository, commit.oid, sizes, bundle.path, commit.commit_url)


def pull(options: PullOptions, *, progress: Progress | None = None) -> Shared:
    """Fetch a bundle, verify all of it, and give the folder its name.

    Files fetched before a failure are used the next time.

    Raises:
        UsageError: the output exists already, or `repository` is no name of the hub.
        InputError: the repository holds no bundle.
        HubError: the hub cannot be reached, or refuses.
        IntegrityError: a file is not the one that the manifest lists.
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
    _check_files(repository, manifest, blobs)
    sizes = {MANIFEST: len(text)} | {name: file.size for name, file in manifest.files.items()}
    if options.dry_run:
        return Shared(repository, info.sha, sizes, writer.path)
    with writer, disk_errors("cannot write", path=writer.staging), _explained(repository, revision, "pull"):
        _make_room(writer.staging, manifest)
        fetch = Fetch(progress, sum(file.size for file in manifest.files.values()))
        for name, file in manifest.files.items():
            _fetch(fetch, url(name), writer.staging, Blob(name, file.size, file.sha256), repository)
        writer.write(MANIFEST, [text])
        _check_bundle(writer, repository)
        writer.publish()
    return Shared(repository, info.sha, sizes, writer.path)


def _repository(name: str) -> str:
    match = HUB_ID.fullmatch(name)
    if not match or match[2]:
        raise UsageError(f"{name!r} is no name of a repository; write OWNER/NAME, and a branch or commit with --revision")
    return match[1]


def _manifest(repository: str, revision: str, blobs: Mapping[str, Blob], url: str) -> bytes:
    """The bytes of the repository's manifest.json, which lists the other files.

    Raises:
        InputError: the repository has none.
        IntegrityError: it is longer than any manifest.
    """
    if MANIFEST not in blobs:
        raise InputError(
            f"{repository} holds no bundle at revision {revision!r}: it has no {MANIFEST}, but {listed(sorted(blobs)) or 'nothing'}; "
            f"a checkpoint is exported with `pgx export --checkpoint {repository}`"
        )
    if (size := blobs[MANIFEST].size) > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{repository}/{MANIFEST} has {size} bytes; no manifest is longer than {MAX_MANIFEST_BYTES}")
    with tempfile.TemporaryDirectory() as folder:
        Fetch(None, size)(url, blobs[MANIFEST], Path(folder) / MANIFEST, repository)
        return (Path(folder) / MANIFEST).read_bytes()


def _check_files(repository: str, manifest: Manifest, blobs: Mapping[str, Blob]) -> None:
    """See, before anything is fetched, that the repository has the files that its manifest lists.

    Raises:
        IntegrityError: one is missing, or another.
    """
    for name, file in manifest.files.items():
        if name not in blobs:
            raise IntegrityError(f"{repository} has no {name}, which its {MANIFEST} lists; ask its owner to push it again")
        if blobs[name].size != file.size or (len(blobs[name].digest) == 64 and blobs[name].digest != file.sha256):
            raise IntegrityError(
                f"{repository}: {name} is not the file that its {MANIFEST} lists; ask its owner to push it again"
            )


def _make_room(staging: Path, manifest: Manifest) -> None:
    """Delete from the staging folder what is not of this bundle, and see that the rest has room.

    Raises:
        DiskError: it has not.
    """
    digests = [file.sha256 for file in manifest.files.values()]
    names = {*manifest.files, *digests, *(f"{digest}.incomplete" for digest in digests)}
    for path in staging.iterdir():
        if path.name not in names or path.is_symlink() or not path.is_file():
            delete(path)
    missing = sum(file.size for file in manifest.files.values()) - sum(path.stat().st_size for path in staging.iterdir())
    if missing > (free := shutil.disk_usage(staging).free):
        raise DiskError(f"{missing:,} bytes are to be fetched, and {staging.parent} has room for {free:,}; choose another -o")


def _fetch(fetch: Fetch, url: str, staging: Path, blob: Blob, repository: str) -> None:
    file = staging / blob.name
    if file.exists() and file_sha256(file) == blob.digest:
        fetch.skip(blob)
        return
    # A file that is on its way is called after its digest, so that only the same bytes continue it.
    arrived = staging / blob.digest
    fetch(url, blob, arrived, repository)
    with open(arrived, "rb") as opened:
        os.fsync(opened.fileno())
    os.replace(arrived, file)


def _check_bundle(writer: BundleWriter, repository: str) -> None:
    """Verify the fetched bundle as any other, and delete it where it is not sound.

    Raises:
        IntegrityError: it is not sound.
    """
    try:
        Bundle.open(writer.staging)
    except IntegrityError as error:
        shutil.rmtree(writer.staging)
        raise IntegrityError(f"{repository} is no sound bundle, and was deleted here: {error}") from error


def _compare(bundle: Bundle, blobs: Mapping[str, Blob]) -> None:
    """Compare the digests of the hub's files after an upload with the bundle's.

    Raises:
        IntegrityError: a file is missing there, or another.
    """
    files = bundle.manifest.files | {MANIFEST: FileInfo(sha256=file_sha256(bundle.path / MANIFEST), size=0)}
    for name, info in files.items():
        blob = blobs.get(name)
        digest = info.sha256 if blob and len(blob.digest) == 64 else blob and _git_digest(bundle.path / name, blob)
        if blob is None or digest != blob.digest:
            what = "does not have" if blob is None else "has another"
            raise IntegrityError(f"after the upload the hub {what} {name}; push again, and do not change the bundle meanwhile")


def _git_digest(file: Path, blob: Blob) -> str:
    """Git's sha1 of a small file's content, in hexadecimal."""
    content = file.read_bytes()
    digest = Blob(blob.name, len(content), blob.digest).hasher()
    digest.update(content)
    return str(digest.hexdigest())


@contextmanager
def _explained(repository: str, revision: str, command: str) -> Iterator[None]:
    """Turn an error of the hub's library during push or pull into one of ours that says what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    with explained(repository, revision):
        try:
            try:
                yield
            except RuntimeError as error:  # from a thread that uploads a file
                cause = error.__cause__
                if isinstance(cause, HfHubHTTPError | OSError) or (cause and isinstance(cause, transport_errors())):
                    raise cause from error
                raise HubError(f"{repository}: {error}; what was uploaded is kept, run this again") from error
        except OfflineModeIsEnabled as error:
            raise HubError(f"HF_HUB_OFFLINE is set, and pgx {command} needs the hub; unset it") from error
        except transport_errors() as error:
            raise HubError(
                f"{repository}: the hub cannot be reached ({type(error).__name__}); what was sent or fetched is kept; run this again"
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
            raise HubError(f"{repository} was changed by another commit meanwhile (HTTP 409); run this again") from error


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """Keep the hub's library from drawing its bars on stderr, even where that is no terminal."""
    from huggingface_hub import utils

    before = utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    if not bars and not before:
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if not bars and not before:
            utils.enable_progress_bars()  # type: ignore[attr-defined]
