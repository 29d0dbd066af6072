"""What loading weights raises where files are missing, damaged, or of another model."""

import os
import pickle

from safetensors import SafetensorError

from cankd_hf.errors import InputError

NOT_LOADED = (
    *(OSError, EOFError, ImportError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError),
    LookupError,  # what torch raises for a file that is no pickle
)


class NotFetched(InputError):
    """A model that is not here, and that the Hub, or timm, did not give.

    Args:
        problems: see `InputError`.
        name: of the model.
    """

    def __init__(self, problems: str, name: str = "") -> None:
        super().__init__(problems)
        self.name = name


def not_loaded(problem: str, name: str) -> InputError:
    """The error for a model that cannot be loaded: `NotFetched` if nothing of this name is here."""
    return InputError(problem) if os.path.lexists(name) else NotFetched(problem, name)
