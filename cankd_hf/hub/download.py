"""Downloads from data sets on the Hub."""

from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from cankd_hf.errors import InputError


def download_folder(repo: str, folder: Path, pattern: str, place: str) -> None:
    """Downloads the files of a data set that match a pattern into a folder; files that are there are kept.

    Args:
        repo: id of the data set.
        folder: made if it is not there.
        pattern: such as `name/*`.
        place: the key of the repository in messages.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        snapshot_download(repo, repo_type="dataset", allow_patterns=pattern, local_dir=folder)
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        fix = f"check the name, your access to it, and the network ({constants.ENDPOINT}), or leave it out"
        raise InputError(f"{place}: the data set {repo} cannot be read ({said}); {fix}") from error
