"""Keyword arguments of PEFT's calls that are not named in the signatures here: those of a download, and others."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from tunerkit.errors import KeywordError, KeywordWarning
from tunerkit.naming import closest, listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# fmt: off
HUB_KEYWORDS = frozenset({
    "cache_dir", "endpoint", "etag_timeout", "force_download", "headers", "local_dir", "local_dir_use_symlinks",
    "local_files_only", "proxies", "repo_type", "resume_download", "revision", "token", "use_auth_token", "user_agent",
})
"""Where and how a download goes (`tunerkit.checkpoint.hub`); of a folder on this machine they say nothing."""

_SAVING = frozenset({
    "max_shard_size", "push_to_hub", "save_function", "tags", "variant",
})
"""What PEFT's `save_pretrained` takes beside what an upload does; not all of it asks for something here."""

_UPLOADING = frozenset({
    "commit_description", "commit_message", "create_pr", "private", "repo_id", "revision", "token",
})
# fmt: on
"""What `push_to_hub(...)` takes, and `save_pretrained(push_to_hub=True, ...)`."""

_DTYPE = "a checkpoint has no say in the base model's dtype: set it where the base model is loaded."
_PLACE = "the adapter goes where its layers are: place the base model where it is loaded."
_NO_EFFECT = {
    "torch_dtype": _DTYPE,
    "dtype": _DTYPE,
    "device_map": _PLACE,
    "max_memory": _PLACE,
    "offload_folder": _PLACE,
    "offload_dir": _PLACE,
    "offload_index": _PLACE,
}


def of_download(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a call's keyword arguments that a download takes."""
    return {name: value for name, value in given.items() if name in HUB_KEYWORDS}


def of_upload(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a call's keyword arguments that an upload takes."""
    return {name: value for name, value in given.items() if name in _UPLOADING and value is not None}


def check_loading(call: str, given: Mapping[str, Any], known: Iterable[str] = ()) -> None:
    """Look at the keyword arguments of a call that loads, beyond those it has itself.

    Args:
        call: The name of the call, for messages.
        given: The keyword arguments.
        known: The names of those it has itself.

    Raises:
        KeywordError: One asks for something that is not done here, or is unknown.

    Warns:
        KeywordWarning: One asks for something that belongs where the base model is loaded.
    """
    for name, value in given.items():
        if name in _NO_EFFECT and value is not None:
            msg = f"{call}({name}={value!r}) has no effect, as {_NO_EFFECT[name]}"
            warnings.warn(KeywordWarning(msg), stacklevel=3)
    if given.get("use_safetensors") is False:
        msg = f"{call}(use_safetensors=False) asks for a pickle, which can run code: only safetensors are read."
        raise KeywordError(msg)
    taken = {*HUB_KEYWORDS, *_NO_EFFECT, "use_safetensors"}
    _refuse_unknown(call, [name for name in given if name not in taken], known)


def check_saving(call: str, given: Mapping[str, Any], known: Iterable[str] = ()) -> None:
    """Look at the keyword arguments of a call that saves, beyond those it has itself.

    Args:
        call: The name of the call, for messages.
        given: The keyword arguments.
        known: The names of those it has itself.

    Raises:
        KeywordError: One asks for something that is not done here, or is unknown.
    """
    taken = {*HUB_KEYWORDS, *_SAVING, *_UPLOADING}
    _refuse_unknown(call, [name for name in given if name not in taken], known)


def _refuse_unknown(call: str, unknown: list[str], known: Iterable[str]) -> None:
    if unknown:
        near = closest(unknown[0], known)
        hint = f" Closest to {unknown[0]!r}: {listing(near)}." if near else ""
        msg = f"{call} has no keyword argument {listing(unknown)}.{hint} Leave it out."
        raise KeywordError(msg)
