"""Names on the Hugging Face Hub, and the adapters that are fetched by them."""

import re
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download

from ctrl.errors import UserError, first_line

FILES = ["adapter.json", "pytorch_lora_weights.safetensors", "label_embedding.safetensors"]  # all that is read of an adapter: no code


def is_name(text: str) -> bool:
    """Whether `text` is a name on the hub, owner/name."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", text))


def check_repository(name: str) -> None:
    """Raises UserError unless `name` is owner/name."""
    if not is_name(name):
        raise UserError(f"--repository is {name}: give owner/name")


def find_adapter(adapter: str | Path, revision: str | None = None) -> Path:
    """The folder `adapter`, or that of the adapter of this name on the hub, fetched into the hub's cache unless it is there.

    `revision` is a commit, a tag or a branch. UserError where there is neither; what the folder holds is not looked at.
    """
    name = str(adapter)
    if Path(name).is_dir() or not is_name(name):
        if revision:
            raise UserError(f"adapter_revision is {revision}, but the adapter, {name}, is no name on the hub: leave it out")
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except Exception as error:
        at, fetched = f" at {revision}" if revision else "", f"fetch it where there is a network by `hf download {name}`"
        raise UserError(f"adapter: there is no folder {name}; as a name on the hub, it{at} {unreachable(error, fetched)}") from error


def unreachable(error: BaseException, fetched: str) -> str:
    """Why the hub gave nothing, and what to do; `fetched` says how what is asked for gets into the cache."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    where = f"is not in the cache {constants.HF_HUB_CACHE}"
    for one in chain:
        if isinstance(one, errors.GatedRepoError):
            return "is given out under a licence: accept it on its page, and set HF_TOKEN"
        if isinstance(one, errors.RevisionNotFoundError):
            return "is no revision of it: take a commit from its page"
        if isinstance(one, errors.RepositoryNotFoundError):
            return "is not on the hub, or private: correct the name, or set HF_TOKEN"
        if isinstance(one, errors.RemoteEntryNotFoundError):
            return "has no model_index.json on the hub: give a model in diffusers' layout, or its one .safetensors file"
    if constants.is_offline_mode():
        return f"{where}, and HF_HUB_OFFLINE forbids to ask the hub: unset it; or {fetched}"
    if any(isinstance(one, ConnectionError | errors.LocalEntryNotFoundError) or "Connect" in type(one).__name__ for one in chain):
        return f"{where}, and the hub cannot be reached: check the network (HTTPS_PROXY, HF_ENDPOINT); or {fetched}"
    return f"cannot be fetched: {first_line(error)}"
