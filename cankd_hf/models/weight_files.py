"""Files of weights on disk."""

from pathlib import Path


def share(*places: Path) -> None:
    """Gives weights in folders, and files of weights, the rights that their folder grants.

    safetensors makes files for their owner alone, whatever the umask says, so that nobody else on a server could load
    a student whose other files they can read.
    """
    for place in places:
        for file in place.rglob("*.safetensors") if place.is_dir() else [place]:
            file.chmod(file.parent.stat().st_mode & 0o666)
