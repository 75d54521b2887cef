"""Sending the files of a checkpoint to the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunerkit.checkpoint.files import CARD_NAME, CONFIG_NAME
from tunerkit.checkpoint.hub import LOGIN, api, library, reason, status
from tunerkit.checkpoint.writing import write_config
from tunerkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from huggingface_hub import CommitInfo


_MESSAGE = "Upload adapter"


class Upload:
    """A repository on the hub to which files are sent; it is made if it is not there.

    Args:
        repo_id: Its id; without a namespace, it is the user's own.
        commit_message: The first line of the commit's message, if it is not to be the usual one.
        commit_description: What else the message says.
        private: Whether only those see it who may, if it is made; if not given, what the namespace's owner has chosen.
        token: The token to show to the hub; if not given, the one that `hf auth login` has stored.
        revision: The branch, which is made if it is not there; the main one if not given.
        create_pr: Propose the commit as a pull request instead of changing the branch.

    Raises:
        CheckpointError: huggingface_hub is not installed, the hub cannot be reached, or it refuses.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> None:
        library("Uploading to the Hugging Face Hub")
        self.repo_id = repo_id
        self.message = commit_message or _MESSAGE, commit_description
        self.revision = revision
        self.create_pr = create_pr
        self.api = api(token, {})
        with self._telling():
            self.repo_id = self.api.create_repo(repo_id, private=private, exist_ok=True).repo_id

    def fetch_card(self, folder: Path) -> None:
        """Put the model card that the repository has into a folder, to be brought up to date there."""
        from huggingface_hub import errors  # noqa: PLC0415 - an extra

        with self._telling(), contextlib.suppress(errors.EntryNotFoundError, errors.RevisionNotFoundError):
            self.api.hf_hub_download(self.repo_id, CARD_NAME, revision=self.revision, local_dir=folder)

    def send(self, folder: Path, files: Iterable[Path]) -> CommitInfo:
        """Send files below a folder as one commit; those that are not there are left out."""
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415 - an extra

        with self._telling():
            if self.revision is not None and not self.create_pr and not self.revision.startswith("refs/"):
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            summary, description = self.message
            return self.api.create_commit(
                self.repo_id,
                [
                    CommitOperationAdd(path_in_repo=path.relative_to(folder).as_posix(), path_or_fileobj=path)
                    for path in files
                    if path.is_file()
                ],
                commit_message=summary,
                commit_description=description,
                revision=self.revision,
                create_pr=self.create_pr,
            )

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> CheckpointError:
        """Return what a caller is to be told of an error of huggingface_hub's."""
        from huggingface_hub import errors  # noqa: PLC0415 - an extra

        nothing = f"Nothing was uploaded to {self.repo_id!r}"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return CheckpointError(f"{nothing}, as HF_HUB_OFFLINE is set. Save, and upload the folder later.")
        if status(error) in {401, 403, 404}:
            return CheckpointError(
                f"{nothing}: the hub ({self.api.endpoint}) does not let you write there ({reason(error)}). Check the "
                f"id; as a user who may write, {LOGIN}."
            )
        return CheckpointError(
            f"{nothing} on the hub ({self.api.endpoint}): {reason(error)}. Mend that and call it again, or save, and "
            "upload the folder later."
        )


def upload_config(values: Mapping[str, Any], **where: Any) -> CommitInfo:
    """Send a config alone.

    Args:
        values: What the file is to hold.
        where: What `Upload` takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_config(folder, values)
        return Upload(**where).send(Path(folder), [Path(folder, CONFIG_NAME)])
