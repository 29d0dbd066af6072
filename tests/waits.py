"""Counts where the host waits for an accelerator: on a GPU, and without one on a device that is only pretended.

`python -m tests.training.step_waits` prints the counts of every kind of student.

A pretended device computes on the CPU, but its tensors say that they are on `cuda:0`, and every operation on them goes
through a dispatch mode, which sees what would make the host wait on a GPU: reading a value (`item`, `bool`, `tolist`),
a shape that depends on values (`nonzero`, boolean masks, `unique`), and copies in either direction that are not
asynchronous. It also refuses to mix the tensors of two devices, as CUDA does.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from types import FrameType
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("cuda", 0)
# Operations whose CUDA form reads values on the host, mostly to know the shape of their result.
READING = {
    *("_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "bincount", "equal", "is_nonzero"),
    *("unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    *("repeat_interleave", "histc", "multinomial", "linalg_solve", "linalg_inv_ex", "_linalg_check_errors"),
    *("_linalg_eigh", "_linalg_svd", "_linalg_det", "linalg_cholesky_ex", "nms", "_assert_async_host"),
}


class Waits:
    """Counts waits while `open`: (operation, place) -> number; the place is `module:function`, see `place`."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self.open = False
        self.opened = 0  # number of steps that were watched

    def see(self, operation: str) -> None:
        if self.open:
            self.found[operation, place(sys._getframe(1))] += 1

    def without(self, exempt: Iterable[str]) -> dict[tuple[str, str], int]:
        """Those of no exempt place; an exemption is a pattern of `fnmatch`."""
        patterns = list(exempt)
        return {
            key: number
            for key, number in self.found.items()
            if not any(fnmatchcase(key[1], pattern) for pattern in patterns)
        }


def place(frame: FrameType | None) -> str:
    """`module:function`, the innermost of the stack that is neither torch's, Python's nor of this file."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        top = module.partition(".")[0]
        if module != __name__ and top != "torch" and top not in sys.stdlib_module_names:
            return f"{module}:{getattr(frame.f_code, 'co_qualname', frame.f_code.co_name)}"
        frame = frame.f_back
    return "?"


class Pretended(Tensor):
    """A tensor that says it is on `DEVICE`; its values are those of `values`, on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device="meta",  # to autograd, which has threads only for devices that exist
        )
        made.values = values
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.values})"

    def as_subclass(self, cls: Any) -> Any:
        made = self + 0
        made.__class__ = Pretended if cls is Tensor else type(cls.__name__, (cls, Pretended), {})
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a pretended device outside of `pretending`")


def _ours(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


class _Dispatch(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        tensors = [item for item in flat if isinstance(item, Tensor)]
        here = any(isinstance(item, Pretended) for item in tensors)
        target = kwargs.get("device")
        if not here and not _ours(target):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if here:
            self._look(name, func, args, kwargs, tensors)
        elif name == "_to_copy" and not kwargs.get("non_blocking"):
            self.waits.see("copy to the device")
        plain, plain_kwargs = tree_unflatten(
            [item.values if isinstance(item, Pretended) else item for item in flat], spec
        )
        if _ours(target):
            plain_kwargs["device"] = torch.device("cpu")
        plain_kwargs.pop("pin_memory", None)
        result = func(*plain, **plain_kwargs)
        if target is not None and not _ours(target) and name == "_to_copy":
            return result.clone() if result is plain[0] else result
        if name == "copy_" and not isinstance(args[0], Pretended):
            return args[0]
        wrapped = tree_map(lambda item: Pretended(item) if isinstance(item, Tensor) else item, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _look(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Notes a wait; raises RuntimeError for tensors on two devices."""
        host = [item for item in tensors if not isinstance(item, Pretended) and item.ndim]
        if any(item.is_meta for item in tensors if not isinstance(item, Pretended)):
            raise RuntimeError(f"{func}: a tensor without values")
        if name in READING:
            if name != "repeat_interleave" or kwargs.get("output_size") is None:
                self.waits.see(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            found = [item for item in args[1] if isinstance(item, Tensor)]
            masks = [item for item in found if item.dtype in (torch.bool, torch.uint8)]
            for _ in (item for item in found if not isinstance(item, Pretended)):
                self.waits.see("copy of an index to the device")
            if masks and not (name.lstrip("_") != "index" and len(masks) == len(found) and args[2].numel() == 1):
                self.waits.see("boolean mask")
        elif name in ("_to_copy", "copy_"):
            target = kwargs.get("device")
            leaves = (target is not None and not _ours(target)) or not isinstance(args[0], Pretended)
            comes = name == "copy_" and not isinstance(args[1], Pretended) and args[1].ndim > 0
            quiet = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if (leaves or comes) and not quiet:
                self.waits.see("copy to the host" if leaves else "copy to the device")
        elif host:
            raise RuntimeError(f"{func}: expected all tensors on one device, got some on {DEVICE} and some on the CPU")


class _Functions(TorchFunctionMode):
    """What does not reach the dispatcher: tensors made of Python numbers on the device, and `tolist`."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _ours(kwargs.get("device")):
            if isinstance(args[0], Pretended):
                return args[0].to(kwargs.get("dtype") or args[0].dtype)
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.new_tensor and isinstance(args[0], Pretended):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(DEVICE)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Pretended):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            parts = tuple(torch.tensor(part).to(DEVICE) if isinstance(part, list) else part for part in parts)
            args = (args[0], parts if isinstance(args[1], tuple) else parts[0], *args[2:])
        if func is Tensor.tolist and isinstance(args[0], Pretended):
            self.waits.see("copy to the host")
            return args[0].values.detach().tolist()
        if func is Tensor.numpy and isinstance(args[0], Pretended):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.pin_memory:
            return args[0]
        return func(*args, **kwargs)


class _Event:
    """Stands for `torch.cuda.Event`."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


@contextlib.contextmanager
def pretending(waits: Waits, monkeypatch: Any) -> Iterator[None]:
    """Tensors of `cuda` are made on the pretended device inside the context."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
        for state in (PartialState, AcceleratorState):
            patch.setitem(state._shared_state, "device", DEVICE)
        with _Functions(waits), _Dispatch(waits):
            yield


def move(module: nn.Module) -> None:
    """Moves a module to the pretended device; inside `pretending`."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None and not isinstance(value, Pretended):
                moved = nn.Parameter(Pretended(value.detach()), value.requires_grad)
                part._parameters[name] = moved
        for name, value in list(part._buffers.items()):
            if value is not None and not isinstance(value, Pretended):
                part._buffers[name] = Pretended(value.detach())


@contextlib.contextmanager
def counting_on_cuda(waits: Waits) -> Iterator[None]:
    """Counts the waits that torch itself reports on a GPU."""

    def show(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            waits.see("synchronisation")

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
