"""`SavableModel`: writing the adapters of a model to files, here or on the Hugging Face Hub."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tunerkit import refusals
from tunerkit.checkpoint.files import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from tunerkit.checkpoint.upload import Upload
from tunerkit.checkpoint.writing import write_checkpoint
from tunerkit.errors import UnknownAdapterError
from tunerkit.functional import get_peft_model_state_dict
from tunerkit.keywords import check_saving, of_upload
from tunerkit.saved import config_to_save, metadata, own_folder, write_model_card
from tunerkit.standalone import standalone

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from huggingface_hub import CommitInfo

    from tunerkit.config import PeftConfig
    from tunerkit.tuner import BaseTuner


class SavableModel(nn.Module):
    """A base model with adapters that can be written to files."""

    base_model: BaseTuner

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The completed configs by adapter name."""
        return self.base_model.peft_config

    def get_base_model(self) -> nn.Module:
        """Return the base model, whose layers may be adapted."""
        return self.base_model.model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters as PEFT does: `default` into the folder, every other one into a folder below it.

        The folder gets a model card, `README.md`, or the one it has is brought up to date. With `push_to_hub=True` the
        files are then uploaded to the Hugging Face Hub.

        Args:
            save_directory: The folder; made if it is not there.
            safe_serialization: Only True: pickled files are not written.
            selected_adapters: Which; all if not given.
            save_embedding_layers: See `get_peft_model_state_dict`.
            is_main_process: Whether this process writes, where several call this.
            path_initial_model_for_weight_conversion: The folder in which the adapter was saved before training. What
                is written is then its standalone form, which needs no start: a plain adapter for the unchanged base.
            state_dict: The model's state, gathered elsewhere, to take the values from.
            kwargs: `push_to_hub`, and what `push_to_hub(...)` takes, where `repo_id` is the folder's name if it is not
                given; `tags` for the model card; and what else PEFT takes, see `tunerkit.keywords`.

        Raises:
            KeywordError: A keyword argument is unknown.
            UnknownAdapterError: There is no such adapter.
            ConfigError: An adapter is to be converted, and its method has no standalone form.
            CheckpointError: The folder or the values cannot be written; what was there is whole. Or nothing could be
                uploaded; the folder is written.

        Warns:
            CardWarning: The model card could not be written; the checkpoint is.
        """
        check_saving("save_pretrained", kwargs, inspect.signature(self.save_pretrained).parameters)
        refusals.refuse_pickle(safe_serialization)
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self.base_model.check_known(names)
        if not names:
            msg = "The model has no adapter to save. Attach one with add_adapter(name, config)."
            raise UnknownAdapterError(msg)
        folder = Path(save_directory)
        for name in names:
            tensors = get_peft_model_state_dict(
                self, state_dict, adapter_name=name, save_embedding_layers=save_embedding_layers
            )
            config = self.peft_config[name]
            if path_initial_model_for_weight_conversion is not None or config.saved_standalone:
                config, tensors = standalone(self, name, config, tensors, path_initial_model_for_weight_conversion)
            if is_main_process:
                values = config_to_save(config, self.get_base_model())
                write_checkpoint(own_folder(folder, name), values, tensors, metadata(config))
        if is_main_process:
            configs = {name: self.peft_config[name] for name in names}
            write_model_card(folder, self.get_base_model(), configs, kwargs.get("tags") or ())
        if is_main_process and kwargs.get("push_to_hub"):
            asked = {"repo_id": folder.absolute().name, **of_upload(kwargs)}
            Upload(**asked).send(folder, _files(folder, names))

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Upload adapters, their configs and a model card to the Hugging Face Hub, as one commit.

        The files are those of `save_pretrained`. The card that the repository has is brought up to date. Where several
        processes hold the model, one of them calls this.

        Args:
            repo_id: The id of the repository, which is made if it is not there; without a namespace, it is the user's.
            commit_message: The first line of the commit's message.
            commit_description: What else the message says.
            private: Whether only those see the repository who may, if it is made; if not given, what its owner's
                settings say.
            token: The token to show to the hub; if not given, the one that `hf auth login` has stored.
            revision: The branch, which is made if it is not there; the main one if not given.
            create_pr: Propose the commit as a pull request instead of changing the branch.
            max_shard_size: Accepted for PEFT's sake; an adapter is one file.
            tags: Words for the model card by which the adapter is found, beside those that it gets by itself.
            kwargs: What `save_pretrained` takes by its names, such as `selected_adapters`.

        Returns:
            What the hub says of the commit.

        Raises:
            KeywordError: A keyword argument is unknown.
            UnknownAdapterError: There is no such adapter.
            CheckpointError: huggingface_hub is not installed, the hub cannot be reached or refuses, or the adapters
                cannot be written; the repository holds no part of them.
        """
        del max_shard_size
        known = inspect.signature(self.save_pretrained).parameters.keys() - {"save_directory", "is_main_process"}
        check_saving("push_to_hub", {name: kwargs[name] for name in kwargs.keys() - known}, known)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            # First what may be refused here, so that no repository is made for nothing.
            self.save_pretrained(folder, **kwargs)
            names = kwargs.get("selected_adapters") or list(self.peft_config)
            upload = Upload(
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )
            upload.fetch_card(folder)
            write_model_card(
                folder, self.get_base_model(), {name: self.peft_config[name] for name in names}, tags or ()
            )
            return upload.send(folder, _files(folder, names))

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the model card of a folder, or bring the one that is there up to date.

        Warns:
            CardWarning: It could not be written.
        """
        write_model_card(Path(output_dir), self.get_base_model(), self.peft_config)


def _files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the files that a save of adapters has written into a folder."""
    places = [own_folder(folder, name) for name in names]
    return [folder / CARD_NAME, *(place / file for place in places for file in (CONFIG_NAME, WEIGHTS_NAME))]
