"""Pushing a student: one commit, nothing but the student in it, and clear words where the Hub says no."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from cankd_hf.errors import InputError
from cankd_hf.hub.card import card_for
from cankd_hf.hub.files import CARD_FILE, Upload, check_no_secret, student_files

logger = logging.getLogger(__name__)

# One for the process: its single worker keeps background pushes in order.
_api = HfApi(library_name="cankd_hf")
_SIGN_IN = "set the environment variable HF_TOKEN to a token with write access, or run `hf auth login`"


@contextmanager
def hub_problems(repo: str) -> Iterator[None]:
    """Says in one line why the Hub did not do what was asked.

    Raises:
        InputError: instead of what the client raises.
    """
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
    except RuntimeError as error:  # the client's word for weights that did not arrive
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


def check_target(repo: str, token: str | None = None) -> None:
    """Refuses what cannot be pushed to, without asking the Hub.

    Raises:
        InputError: for a name that is none, or where there is no token.
    """
    with hub_problems(repo):
        validate_repo_id(repo)
    if token is None and get_token() is None:
        raise InputError(f"{repo}: pushing needs a token, found none; {_SIGN_IN}")


def open_repo(
    repo: str, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> tuple[str, bool]:
    """Creates the repository, and the branch, where they are not there yet; makes sure that we may write there.

    Args:
        repo: `me/name`, or a name under the token's own account.
        private: whether a new one is private; None leaves it to the account's settings.
        revision: branch to push to.
        token: instead of the one that is signed in.

    Returns:
        The full name, and whether the repository is private.

    Raises:
        InputError: if the Hub refuses.
    """
    check_target(repo, token)
    with hub_problems(repo):
        name = _api.create_repo(repo, private=private, exist_ok=True, token=token).repo_id
        _api.auth_check(name, write=True, token=token)  # creating passes over what is there, even where it is not ours
        is_private = bool(_api.model_info(name, token=token).private)
        if revision is not None:
            _api.create_branch(name, branch=revision, exist_ok=True, token=token)
    return name, is_private


def plan(folder: str | Path, repo: str, subfolders: tuple[str, ...] = ("",)) -> list[Upload]:
    """What a push of this folder would upload: the student, and a card that names the repository.

    Args:
        folder: of a run or of a checkpoint.
        repo: where it goes.
        subfolders: places in the repository, "" for its root; each gets the whole student.

    Raises:
        InputError: if there is no student, or a file holds a token.
    """
    folder = Path(folder)
    files = [_without_home(Upload(file.name, file)) for file in student_files(folder)]
    files.append(Upload(CARD_FILE, card_for(folder, repo).encode()))
    check_no_secret(files)
    return [
        Upload(str(PurePosixPath(subfolder) / upload.name), upload.source)
        for subfolder in subfolders
        for upload in files
    ]


def _without_home(upload: Upload) -> Upload:
    """Facts and recipe with `~` for the home folder, whose name is nobody's business."""
    home = str(Path.home())
    if not upload.name.endswith((".json", ".yaml")) or len(home) < 2:
        return upload
    content = upload.text()
    return Upload(upload.name, content.replace(home.encode(), b"~")) if home.encode() in content else upload


def push(
    uploads: list[Upload], repo: str, message: str, revision: str | None = None, token: str | None = None
) -> CommitInfo:
    """Uploads files in one commit: the repository holds all of them or is as it was.

    Raises:
        InputError: if it did not work; it can be repeated, and what was uploaded before is not sent again.
    """
    with hub_problems(repo):
        return _api.create_commit(
            repo, _operations(uploads), commit_message=message, revision=revision, token=token, repo_type="model"
        )


def push_in_background(
    uploads: list[Upload], repo: str, message: str, revision: str | None = None, token: str | None = None
) -> Future[CommitInfo]:
    """The same beside the training, from a copy: the files may change or go while it runs.

    A failure is logged as one line and never reaches the training.
    """
    copies = Path(tempfile.mkdtemp(prefix="cankd-push-"))
    kept = {upload.source for upload in uploads if isinstance(upload.source, Path)}
    places = {source: copies / source.name for source in kept}
    for source, place in places.items():
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


def _operations(uploads: list[Upload]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(u.name, u.source if isinstance(u.source, bytes) else str(u.source)) for u in uploads]
