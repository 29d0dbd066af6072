"""What callbacks get as `model`."""

from typing import Any, cast

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.trainer_callback import CallbackHandler

from cankd_hf.training.distiller import Distiller


def unwrapped(model: nn.Module) -> nn.Module:
    """The module without wrappers such as DDP or `torch.compile`."""
    if isinstance(model, Distiller) and "_orig_mod" not in vars(model):
        return model  # accelerate would look at each module of it; this is asked many times in a step
    return cast(nn.Module, extract_model_from_parallel(model, keep_torch_compile=False))


class StudentCallbackHandler(CallbackHandler):
    """A `CallbackHandler` whose callbacks get the student as `model`.

    Callbacks that save, describe or change the model then do so with the student, and not with the module around it,
    whose tensors have other names.
    """

    @property
    def model(self) -> Any:
        model = vars(self)["model"]
        whole = None if model is None else unwrapped(model)
        return whole.student if isinstance(whole, Distiller) else model

    @model.setter
    def model(self, model: Any) -> None:
        vars(self)["model"] = model
