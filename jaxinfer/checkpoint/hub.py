"""From a folder's path or the id of a model on the Hugging Face hub to a local folder."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from jaxinfer.checkpoint.contents import ALLOW, IGNORE, SMALL, TEMPLATES, belonging, weights_of
from jaxinfer.checkpoint.files import check_folder
from jaxinfer.checkpoint.remote import fetch
from jaxinfer.places import locate

TIMEOUT = 8.0  # seconds until the hub must have answered the first question

T = TypeVar("T")

logger = logging.getLogger(__name__)


def resolve(
    model: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    weights: bool = True,
    cache: str | Path | None = None,
) -> Path:
    """The local folder of `model`: a folder's path, a hub id ("owner/name", "name"), which is downloaded, or
    the URL of a converted checkpoint (gs://bucket/name), of which all but the weights is.

    `revision` (branch, tag or commit) and `token` (None: as stored by the hub's login) belong to hub ids. Downloads go
    through huggingface_hub's cache, or into the folder `cache` as one; without network, or with HF_HUB_OFFLINE=1, what
    is cached is used.
    Without `weights` only what is beside them is downloaded: the tokenizer, above all.
    An existing folder comes first; paths (/, ./, ../, ~, a Path, or a first part that is a folder) are never hub ids.

    Raises, with one line each: FileNotFoundError (no such folder, no such model), NotADirectoryError, ValueError (not
    a hub id, no such revision, a revision of a folder), PermissionError (access must be asked for), ConnectionError
    (no network, or offline, and not cached), OSError (a download that failed).
    """
    if not isinstance(model, str | os.PathLike):
        raise ValueError(f"model is {model!r:.100}: it must be a folder, or a hub id such as owner/name")
    name = os.fspath(model)
    if not name:
        raise ValueError("model: empty; give a folder or a hub id such as owner/name")
    if "://" in name:
        if revision is not None:
            raise ValueError(f"revision {revision!r}: {name} is a URL; revisions are for hub ids")
        return fetch(name)
    path = Path(os.path.expanduser(name))
    if os.path.lexists(path):
        if revision is not None:
            raise ValueError(f"revision {revision!r}: {name} is a local folder; revisions are for hub ids")
        return check_folder(path)
    locate(name, "model")  # a URL that has lost a slash, as a Path takes it, is none
    if not isinstance(model, str) or name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder")
    owner = name.split("/")[0]
    if owner != name and os.path.isdir(owner):
        raise FileNotFoundError(f"{name}: no such folder (and not taken for a hub id, as the folder {owner} exists)")
    return _download(name, revision, token, weights, cache)


def _download(
    name: str, revision: str | None, token: str | bool | None, weights: bool, cache: str | Path | None
) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download

    at = f"{name} (revision {revision})" if revision else name

    def snapshot(allow: Sequence[str], ignore: Sequence[str] = ("*/*", *IGNORE), **options: Any) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache,
                allow_patterns=list(allow),
                ignore_patterns=list(ignore),
                **options,
            )
        )

    def explain(error: Exception) -> Exception:
        detail = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, errors.HFValidationError):
            return ValueError(f"{name!r}: neither a folder nor a hub id (owner/name): {detail}")
        if isinstance(error, errors.RevisionNotFoundError):
            return ValueError(
                f"{name}: no revision {revision!r} on the hub; give a branch, tag or commit that is there"
            )
        if isinstance(error, errors.GatedRepoError):
            return PermissionError(
                f"{at}: access is restricted; ask for it on https://huggingface.co/{name}, then log in"
                " (`hf auth login`) or set HF_TOKEN"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return FileNotFoundError(
                f"{at}: no such folder, and no such model on the hub; check the name, and for a private model log in"
                " (`hf auth login`) or set HF_TOKEN"
            )
        if isinstance(error, errors.OfflineModeIsEnabled):
            return ConnectionError(
                f"{at}: not in the hub's cache, and offline mode is on; unset HF_HUB_OFFLINE or give a folder"
            )
        if hasattr(error, "snapshot_path"):  # an IncompleteSnapshotError, which older versions don't have
            return ConnectionError(f"{at}: only a part is in the hub's cache, and the hub can't be reached: {detail}")
        if isinstance(error, errors.HfHubHTTPError):
            return OSError(f"{at}: the hub answered with an error: {detail}")
        return OSError(f"{at}: the download failed: {detail}; try again, what has arrived is kept")

    # snapshot_download sets no limit to its first request, so without network it can hang for minutes. Ask first.
    try:
        info = _within(TIMEOUT, lambda: HfApi(token=token).model_info(name, revision=revision, timeout=TIMEOUT))
    except (errors.HFValidationError, errors.RevisionNotFoundError) as error:
        raise explain(error) from None
    except Exception as error:  # the HTTP client, whose errors these are, differs between versions of huggingface_hub
        try:
            folder = snapshot(ALLOW if weights else SMALL, local_files_only=True)
        except errors.LocalEntryNotFoundError as local:
            if hasattr(local, "snapshot_path"):
                raise explain(local) from None
            if isinstance(error, errors.HfHubHTTPError | errors.OfflineModeIsEnabled | errors.LocalTokenNotFoundError):
                raise explain(error) from None
            detail = " ".join(str(error).split())[:200] or f"no answer in {TIMEOUT:g} s"
            raise ConnectionError(
                f"{at}: no such folder, not in the hub's cache, and the hub can't be reached ({detail});"
                " check the network or give a folder"
            ) from None
        if not isinstance(error, errors.OfflineModeIsEnabled):
            logger.warning("%s: using the cached copy, as the hub can't be asked: %s", at, explain(error))
        return folder
    try:
        # Its patterns can't except folders. These come first, as what is cached counts as whole when the others are.
        names = [file.rfilename for file in info.siblings or ()]
        if belonging(names, allow=()):
            snapshot(TEMPLATES, ())
        if "modules.json" in names and weights:
            from jaxinfer.checkpoint.sentence import module_folders  # JAX comes with it

            folder = snapshot(["modules.json"], ())
            for place in {str(module.relative_to(folder)) for module in module_folders(folder)} - {"."}:
                own = [name.removeprefix(f"{place}/") for name in names if name.startswith(f"{place}/")]
                snapshot([f"{place}/{pattern}" for pattern in weights_of(own)], ())
        return snapshot(weights_of(names) if weights else SMALL)
    except Exception as error:
        raise explain(error) from None


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Runs `call`, for at most `seconds`: its own timeout counts for each address of a host, and not for names."""
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True, name="hub").start()
    return done.result(seconds)
