"""Pushing a student: one commit with only the student in it, and clear messages where the Hub refuses."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME

from cankd_hf.errors import InputError
from cankd_hf.hub.card import card_for
from cankd_hf.hub.facts import read_facts
from cankd_hf.hub.files import Upload, check_no_secret, student_files
from cankd_hf.hub.licences import UNKNOWN, check_licences
from cankd_hf.names import CARD_FILE, EMA, RAW

logger = logging.getLogger(__name__)

# One per process: its single worker keeps background pushes in order.
_api = HfApi(library_name="cankd_hf")
_SIGN_IN = "set the environment variable HF_TOKEN to a token with write access, or run `hf auth login`"


@contextmanager
def hub_problems(repo: str) -> Iterator[None]:
    """Turns the client's errors into an InputError that says in one line what went wrong."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise InputError(f"{repo}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
    except HFValidationError as error:
        raise InputError(f"{repo}: expected a repository name like me/my-student: {_line(error)}") from error
    except HfHubHTTPError as error:
        raise InputError(f"{repo}: {_refusal(error)}") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise InputError(
            f"{repo}: the Hub at {constants.ENDPOINT} cannot be reached ({_line(error)}); nothing was lost, "
            "check the network and push again"
        ) from error
    except RuntimeError as error:  # raised by the client for an upload that did not complete
        raise InputError(
            f"{repo}: the upload broke off ({_line(error.__cause__ or error)}); nothing was lost, push again"
        ) from error
    except ValueError as error:
        raise InputError(f"{repo}: {_line(error)}") from error


def _refusal(error: HfHubHTTPError) -> str:
    code = error.response.status_code
    said = _line(error.server_message or error)
    if code == 401:
        return f"the Hub does not accept the token ({said}); {_SIGN_IN}"
    if code == 403:
        return (
            f"the Hub does not let you write there ({said}); push under your own name or an organisation of yours, "
            "with a token that has write access"
        )
    if code == 404:
        return f"not found on the Hub, or not visible to your token ({said}); check the name and --revision"
    if code == 409:
        return f"the name is taken, or somebody else pushed at the same time ({said}); take another name or push again"
    return f"the Hub answered {code} ({said}); nothing was lost, push again later"


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_name(repo: str) -> None:
    """Raises InputError for an invalid repository name."""
    with hub_problems(repo):
        validate_repo_id(repo)


def check_target(repo: str, token: str | None = None) -> None:
    """Raises InputError for an invalid repository name or without a token, without a request to the Hub."""
    check_name(repo)
    if token is None and get_token() is None:
        raise InputError(f"{repo}: pushing needs a token, found none; {_SIGN_IN}")


def open_repo(
    repo: str, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> tuple[str, bool]:
    """Creates repository and branch where they do not exist, and checks that the token may write there.

    `repo` may lack the owner, which is then the token's; `private` None leaves it to the account's settings. Returns
    the full name, and whether the repository is private.

    Raises:
        InputError: if the Hub refuses, or the repository exists and is public although a private one is asked for.
    """
    check_target(repo, token)
    with hub_problems(repo):
        name = _api.create_repo(repo, private=private, exist_ok=True, token=token).repo_id
        _api.auth_check(name, write=True, token=token)  # create_repo accepts an existing one of another owner
        is_private = bool(_api.model_info(name, token=token).private)
    if private and not is_private:
        raise InputError(
            f"{name}: expected a private repository, this one exists and is public; if all may see the student, add "
            "--public, or set hub.private: false in the recipe"
        )
    if revision is not None:
        with hub_problems(repo):
            _api.create_branch(name, branch=revision, exist_ok=True, token=token)
    return name, is_private


def plan(
    folder: str | Path,
    repo: str,
    subfolders: tuple[str, ...] = ("",),
    stated: Mapping[str, str] | None = None,
    cleared: Sequence[str] = (),
    licence: str | None = None,
) -> list[Upload]:
    """What a push of a run or checkpoint would upload: the student, and a card that names the repository.

    Each of the repository's `subfolders` ("" for its root) gets the whole student. `stated` and `cleared` are those of
    `check_licences`; `licence` is the student's own, by default that of its recipe.

    Raises:
        InputError: if there is no student, a file contains a token, or a licence of what the student comes from
            forbids the student's own, or is not known.
    """
    folder = Path(folder)
    files = [_without_home(Upload(file.name, file)) for file in student_files(folder)]
    for beside in (EMA, RAW):
        if (folder / beside / CONFIG_NAME).is_file():
            inner = student_files(folder / beside)
            files += [_without_home(Upload(f"{beside}/{file.name}", file)) for file in inner]
    card = card_for(folder, repo, stated, cleared, licence)
    files.append(Upload(CARD_FILE, card.encode()))
    check_no_secret(files)
    metadata = ModelCard(card).data
    own = metadata.get("license_name") or metadata.get("license") or UNKNOWN
    check_licences(read_facts(folder), str(own), stated, cleared, owner=repo.rpartition("/")[0])
    return [
        Upload(str(PurePosixPath(subfolder) / upload.name), upload.source)
        for subfolder in subfolders
        for upload in files
    ]


def _without_home(upload: Upload) -> Upload:
    """Facts and recipe with `~` in place of the home folder, whose name is private."""
    home = str(Path.home())
    if not upload.name.endswith((".json", ".yaml")) or len(home) < 2:
        return upload
    content = upload.text()
    return Upload(upload.name, content.replace(home.encode(), b"~")) if home.encode() in content else upload


def push(
    uploads: list[Upload], repo: str, message: str, revision: str | None = None, token: str | None = None
) -> CommitInfo:
    """Uploads files in one commit: all of them or none.

    Raises:
        InputError: if it failed; a second try does not send again what was uploaded before.
    """
    operations = [CommitOperationAdd(upload.name, upload.source) for upload in uploads]
    with hub_problems(repo):
        return _api.create_commit(repo, operations, commit_message=message, revision=revision, token=token)


def push_in_background(
    uploads: list[Upload], repo: str, message: str, revision: str | None = None, token: str | None = None
) -> Future[CommitInfo]:
    """The same during training, from a copy of the files, which may change meanwhile; a failure is only logged."""
    copies = Path(tempfile.mkdtemp(prefix="cankd-push-"))
    kept = {upload.source for upload in uploads if isinstance(upload.source, Path)}
    places = {source: copies / str(number) / source.name for number, source in enumerate(kept)}
    for source, place in places.items():
        place.parent.mkdir()
        shutil.copyfile(source, place)
    moved = [u if isinstance(u.source, bytes) else Upload(u.name, places[u.source]) for u in uploads]

    def job() -> CommitInfo:
        try:
            return push(moved, repo, message, revision, token)
        except InputError as error:
            logger.warning("%s was not pushed: %s", message, error)
            raise
        finally:
            shutil.rmtree(copies)

    return _api.run_as_future(job)
