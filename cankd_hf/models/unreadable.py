"""What loading weights raises where files are missing, damaged, or of another model."""

import pickle

from safetensors import SafetensorError

NOT_LOADED = (
    *(OSError, EOFError, ImportError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError),
    LookupError,  # what torch raises for a file that is no pickle
)
