"""Checkpoints on the Hugging Face Hub: fetching one by its id, and saying what is wrong where it cannot be.

All of it goes through huggingface_hub, an extra that is imported where an id is first used. A download ends in its
cache or nowhere: a file that was cut has another name there until it is whole.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tunerkit.checkpoint.files import CONFIG_NAME, missing_file
from tunerkit.checkpoint.folder import as_path, entries_of, is_id
from tunerkit.errors import CheckpointError, CheckpointNotFoundError, KeywordError
from tunerkit.naming import closest, listing

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from huggingface_hub import HfApi

_ASKING = ("endpoint", "headers", "user_agent")
"""The keywords of a download that say whom to ask, and as whom; `token` too."""

_KEEPING = ("cache_dir", "etag_timeout", "force_download", "local_files_only", "repo_type")
"""The keywords of a download that say what is asked for, and where it is kept; `revision` too."""

_REFUSED = {
    "local_dir": "Download the repository there with huggingface_hub.snapshot_download, and pass that folder.",
    "proxies": "Set the environment variable HTTPS_PROXY.",
}

LOGIN = "pass token=..., or log in once with `hf auth login`"


def fetched(
    name_or_path: str | os.PathLike[str],
    files: Sequence[str],
    subfolder: str | None = None,
    given: Mapping[str, Any] | None = None,
    also: Iterable[str] = (),
) -> Path:
    """Return the folder of a checkpoint; of one on the hub, the folder in the cache where its files are now.

    All files come from one commit, that to which the revision leads when the first of them is asked for.

    Args:
        name_or_path: A folder, which is not looked into here; or the id of a repository, where there is no such folder.
        files: The files that are needed.
        subfolder: A folder below.
        given: The keywords that a download takes (`tunerkit.keywords.HUB_KEYWORDS`); they say nothing of a folder.
        also: Files that are fetched if the repository has them.

    Raises:
        KeywordError: A keyword cannot be heeded.
        CheckpointNotFoundError: There is no such repository, revision or file, or it may not be read, or it is not in
            the cache and the hub cannot be reached.
        CheckpointError: A file could not be downloaded, or huggingface_hub is not installed.
    """
    path = as_path(name_or_path)
    if not is_id(name_or_path):
        return path / (subfolder or "")
    name = str(name_or_path)
    hub = library(f"{_no_folder(name)}, and loading from the Hugging Face Hub")
    try:
        hub.utils.validate_repo_id(name)
    except hub.errors.HFValidationError:
        return path / (subfolder or "")
    return Download(name, subfolder, given or {}).fetch(files, also)


class Download:
    """Files of one folder of a repository, on their way to the cache."""

    def __init__(self, repo_id: str, subfolder: str | None, given: Mapping[str, Any]) -> None:
        given = {name: value for name, value in given.items() if value is not None}
        for name in _REFUSED.keys() & given.keys():
            msg = f"{name}={given[name]!r} is not supported for a repository of the hub. {_REFUSED[name]}"
            raise KeywordError(msg)
        self.repo_id = repo_id
        self.folder = PurePosixPath(Path(subfolder or "").as_posix())
        self.revision: str | None = given.get("revision")
        self.keeping = {name: given[name] for name in _KEEPING if name in given}
        token = given.get("token", given.get("use_auth_token"))
        self.api = api(token, {name: given[name] for name in _ASKING if name in given})

    def fetch(self, files: Iterable[str], also: Iterable[str]) -> Path:
        """Return the folder in the cache where the files are now."""
        from huggingface_hub import errors  # noqa: PLC0415 - an extra

        path = Path()
        for file in files:
            try:
                path = self._file(file)
            except Exception as error:
                raise self._explained(error, file) from error
            self.revision = path.parents[len(self.folder.parts)].name
        for file in also:
            with contextlib.suppress(errors.EntryNotFoundError, errors.HfHubHTTPError):
                self._file(file)
        return path.parent

    def _file(self, file: str) -> Path:
        name = str(self.folder / file)
        return Path(self.api.hf_hub_download(self.repo_id, name, revision=self.revision, **self.keeping))

    def _explained(self, error: Exception, file: str) -> CheckpointError:
        """Return what a caller is to be told of an error of huggingface_hub's."""
        from huggingface_hub import errors  # noqa: PLC0415 - an extra

        where = f"{self.api.endpoint}/{self.repo_id}"
        if isinstance(error, errors.GatedRepoError):
            return CheckpointNotFoundError(
                f"The authors of the repository {self.repo_id!r} say who may read it. Ask them at {where}; as the user "
                f"whom they let in, {LOGIN}."
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return CheckpointNotFoundError(
                f"{_no_folder(self.repo_id)}, and the hub ({self.api.endpoint}) shows no repository {self.repo_id!r}. "
                f"Check the id or the path; if the repository is private, {LOGIN}."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return CheckpointNotFoundError(
                f"The repository {self.repo_id!r} has no revision {self.revision!r}. Check it at {where}: it is the "
                "name of a branch or a tag, or a commit; without revision=... it is 'main'."
            )
        unreached = isinstance(error, errors.LocalEntryNotFoundError)
        if isinstance(error, errors.EntryNotFoundError) and not unreached:
            return CheckpointNotFoundError(self._missing(file))
        # A file is not in the cache; the cause says why the hub did not help.
        cause = (error.__cause__ or error) if unreached else error
        asked = f"'{self.folder / file}' of the repository {self.repo_id!r}"
        code = status(cause)
        if code in {401, 403}:
            return CheckpointError(
                f"The hub does not give {asked} to who asks ({reason(cause)}). If you may read it, {LOGIN}."
            )
        if code is not None:
            return CheckpointError(
                f"The hub ({self.api.endpoint}) did not give {asked} ({reason(cause)}). Try again later."
            )
        return (
            self._unreached(cause, asked)
            if unreached
            else CheckpointError(
                f"{asked} could not be downloaded ({reason(error)}). No part of it is taken for the file. Check the "
                "network and the space on the disk, and load it again."
            )
        )

    def _unreached(self, cause: BaseException, asked: str) -> CheckpointError:
        """Return what is to be told of a file that is not in the cache, and for which the hub gave no answer."""
        from huggingface_hub import constants, errors  # noqa: PLC0415 - an extra

        cache = self.keeping.get("cache_dir", constants.HF_HUB_CACHE)
        place = f"{_no_folder(self.repo_id)}, and {asked} is not in the cache '{cache}'"
        local = self.keeping.get("local_files_only")
        if local or isinstance(cause, errors.OfflineModeIsEnabled):
            why = "local_files_only=True" if local else "HF_HUB_OFFLINE is set"
            return CheckpointNotFoundError(
                f"{place}; the hub was not asked, as {why}. Load it once without, or pass a checkpoint's folder."
            )
        return CheckpointNotFoundError(
            f"{place}; the hub ({self.api.endpoint}) cannot be reached ({reason(cause)}). Check the network, or pass a "
            "checkpoint's folder."
        )

    def _missing(self, file: str) -> str:
        """Return the message for a folder of a repository that lacks a file."""
        place = f"the repository {self.repo_id!r}"
        if self.folder.parts:
            place = f"the folder '{self.folder}' of {place}"
        names: list[str] = []
        with contextlib.suppress(Exception):  # They are for a message, which does without.
            listed = self.api.list_repo_files(self.repo_id, revision=self.revision)
            paths = [path for path in map(PurePosixPath, listed) if path.is_relative_to(self.folder)]
            names = [str(path.relative_to(self.folder)) for path in paths]
        inside = sorted(name.partition("/")[0] for name in names if name.endswith(f"/{CONFIG_NAME}"))
        found = missing_file(place, file, sorted({name.partition("/")[0] for name in names}), inside)
        found = f"{found[0].upper()}{found[1:]}"
        return f"{found} On the hub that is subfolder={inside[0]!r}." if inside else found


def library(why: str) -> Any:
    """Return huggingface_hub.

    Args:
        why: What it is needed for.

    Raises:
        CheckpointError: It is not installed.
    """
    try:
        import huggingface_hub  # noqa: PLC0415 - an extra, and slow
        import huggingface_hub.errors  # noqa: PLC0415 - not all versions do this by themselves
        import huggingface_hub.utils  # noqa: PLC0415 - the same
    except ModuleNotFoundError as error:
        msg = f"{why} needs huggingface_hub, which is not installed: pip install 'tunerkit[hub]'"
        raise CheckpointError(msg) from error
    return huggingface_hub


def api(token: str | bool | None, asking: Mapping[str, Any]) -> HfApi:
    """Return what asks the hub, with a token and other things that each request is to carry."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - an extra

    version = importlib.metadata.version("tunerkit")
    return HfApi(token=token, library_name="tunerkit", library_version=version, **asking)


def status(error: BaseException | None) -> int | None:
    """Return the number with which the hub answered, if that is what an error of huggingface_hub's says."""
    from huggingface_hub import errors  # noqa: PLC0415 - an extra

    response = error.response if isinstance(error, errors.HfHubHTTPError) else None
    return None if response is None else response.status_code


def reason(error: BaseException) -> str:
    """Return what an error of huggingface_hub's says, in one line."""
    said = next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _no_folder(name: str) -> str:
    path = Path(name)
    near = closest(path.name, [entry for entry in entries_of(path.parent) if (path.parent / entry).is_dir()])
    similar = f" (similar folders: {listing(near)})" if near else ""
    return f"There is no folder {name!r} here{similar}"
