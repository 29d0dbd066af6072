"""What callbacks get as `model`."""

from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers.trainer_callback import CallbackHandler

from cankd_hf.training.distiller import Distiller


class StudentCallbackHandler(CallbackHandler):
    """A `CallbackHandler` whose callbacks get the student as `model`.

    Callbacks that save, describe or change the model then do so with the student, and not with the module around it,
    whose tensors have other names.
    """

    @property
    def model(self) -> Any:
        model = vars(self)["model"]
        if model is None:
            return None
        whole = extract_model_from_parallel(model, keep_torch_compile=False)
        return whole.student if isinstance(whole, Distiller) else model

    @model.setter
    def model(self, model: Any) -> None:
        vars(self)["model"] = model
