"""Losses, gradients, teacher maps and weights that are not finite: told, skipped, and never saved or scored."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from cankd_hf.data.common.batch import Batch
from cankd_hf.errors import InputError
from cankd_hf.models.finite import local
from cankd_hf.teachers.health import TeacherHealth, title
from cankd_hf.teachers.teacher import TeacherOutput
from cankd_hf.training.base import TeachingTrainer
from cankd_hf.training.finite_scores import ScoreGuard, bad_images

logger = logging.getLogger(__name__)

_LOSS, _GRADIENT = "loss", "gradient"
# A flag of a teacher's map is 1 + index in the batch + _PLACES * (1 + sample), which is 0 for a finite one.
_PLACES = 2**20


class _Finite(Tensor):
    """A loss that is known to be finite, so that whoever asks does not wait for the device.

    The Trainer does in each step, for `logging_nan_inf_filter`. Whatever else is asked of it, a plain tensor answers.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.isnan, torch.isinf):
            return torch.zeros((), dtype=torch.bool)
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map_only(cls, lambda loss: loss.as_subclass(Tensor), (args, kwargs or {}))
            return func(*args, **kwargs)


class StepGuard(ScoreGuard, TrainerCallback):
    """Skips the update of a step whose loss or gradient is not finite, tells it, and stops after some in a row.

    Flags are int64 tensors [] on the device, 0 where all is finite, and all processes agree on them. On a CPU they are
    read at their step. On CUDA the host never waits for a step's own flags: the device skips the update by them
    (a fused optimizer through its `found_inf`, others by putting back what they changed), and they are read one step
    later. With fp16 the gradient scaler skips, and its search for a scale does not count.

    BatchNorm statistics that the step changed are put back too: the same forward may have filled them with NaN.
    """

    def __init__(self, trainer: TeachingTrainer) -> None:
        super().__init__(trainer)
        self.late = self.args.device.type == "cuda"
        self._flags: dict[str, Tensor] = {}
        self._teachers: dict[str, tuple[str, str]] = {}  # name of a flag -> teacher and tap
        self._buffers: list[Tensor] = []
        self._buffers_before: list[Tensor] = []
        self._bad = torch.zeros((), dtype=torch.bool)
        self._undo: list[tuple[Tensor, Tensor]] = []
        self._read: tuple[int, list[str], Tensor, Any] | None = None  # the flags of a step that are still to be read
        self._reset()

    def _reset(self) -> None:
        self.steps = self.skipped = self.in_a_row = 0
        self._since_log = self._lost_since_log = 0

    # What is seen in a step

    def _see(self, name: str, flag: Tensor) -> None:
        flag = flag.to(torch.int64)
        self._flags[name] = torch.maximum(self._flags[name], flag) if name in self._flags else flag

    def see_parts(self, parts: Mapping[str, Tensor] | None) -> None:
        """The unweighted losses [] of one forward pass."""
        for name, value in (parts or {}).items():
            self._see(f"{_LOSS} {name}", ~torch.isfinite(value))

    def see_loss(self, loss: Tensor) -> Tensor:
        """The loss [] of one batch; returns it for the logs, 0 if it is not finite."""
        finite = torch.isfinite(loss)
        self._see(_LOSS, ~finite)
        loss = torch.where(finite, loss, torch.zeros_like(loss))
        return loss.as_subclass(_Finite) if self.late else loss

    def see_norm(self, norm: Any) -> None:
        """The norm of the whole gradient; with fp16 it counts only once the scale has gone below 1."""
        if norm is None:  # DeepSpeed before its first step
            return
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm, device=self.args.device)
        bad = ~torch.isfinite(norm.detach().squeeze())
        scaler = self.trainer.accelerator.scaler
        self._see(_GRADIENT, bad if scaler is None else bad & (scaler._get_scale_async() < 1))

    def see_teachers(self, outputs: Mapping[str, TeacherOutput], batch: Batch) -> None:
        """Raises InputError for a map or logits that are not finite; in several processes, or late, at the step."""
        samples = batch.meta.get("sample")
        for name, output in outputs.items():
            taps = self.trainer.taps_of(name)
            found = {f"tap {tap}": value for tap, value in zip(taps, output.maps, strict=False)}
            if output.logits is not None:
                found["logits"] = output.logits
            for place, value in found.items():
                self._teachers[f"{name} {place}"] = (name, place)
                self._see(f"{name} {place}", _first_bad(value, samples, mask=place == "logits"))
        if not self.late and self.args.world_size == 1:
            self._check_teachers({name: int(flag) for name, flag in self._flags.items() if name in self._teachers})

    def _check_teachers(self, flags: Mapping[str, int]) -> None:
        for flag, code in flags.items():
            if not code or flag not in self._teachers:
                continue
            name, place = self._teachers[flag]
            sample, index = divmod(code - 1, _PLACES)
            which = self._image(sample - 1) if sample else f"image {index} of its batch"
            raise InputError(
                f"{title(name)}: expected finite values, got NaN or infinity at {place} for {which}; "
                "check that image, and the teacher's weights and dtype"
            )

    def begin_scoring(self) -> None:
        super().begin_scoring()
        self._flags.clear()

    def end_scoring(self) -> None:
        flags = {name: int(flag) for name, flag in self._flags.items() if name in self._teachers}
        if self.anywhere(any(flags.values())):
            self._check_teachers(flags)
            raise InputError(
                "teacher: expected finite values, got NaN or infinity on another process; see its message"
            )
        super().end_scoring()

    def _check_teachers_alike(self) -> None:
        """Raises InputError if the processes would learn from different teachers."""
        own = {name: teacher.fingerprint for name, teacher in self.trainer.teachers.items()}
        if self.args.world_size == 1 or not own:
            return
        all_of_them: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(all_of_them, own)
        for name in own:
            if len({fingerprints[name] for fingerprints in all_of_them}) > 1:
                raise InputError(
                    f"{title(name)}: expected the same weights on every process, got others; pass its folder or "
                    "TeacherConfig to the trainer, or load it with load_teacher(..., seed=...)"
                )

    def _image(self, sample: int) -> str:
        """An image of the training set by its number, and by its name where the data set knows names."""
        name = getattr(getattr(self.trainer.train_dataset, "dataset", None), "name", None)
        known = f" ({name(sample)})" if callable(name) else ""
        return f"image {sample} of the training set{known}"

    # The callbacks of a step, in their order

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._reset()
        self._read = None
        self.check_weights("to train")
        self._check_teachers_alike()
        buffers = self.trainer.distiller.named_buffers()
        self._buffers = [b for name, b in buffers if b.is_floating_point() or name.endswith("num_batches_tracked")]
        self._buffers_before = [buffer.clone() for buffer in self._buffers]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._flags.clear()
        if self._buffers:
            torch._foreach_copy_(self._buffers_before, self._buffers)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        if not self._flags:  # a subclass that computes its steps in its own way
            return
        names, flags = list(self._flags), torch.stack(list(self._flags.values()))
        if args.world_size > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self._bad = flags.any()
        host, event = flags, None
        if flags.is_cuda:
            host, event = flags.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self._read, before = (state.global_step + 1, names, host, event), self._read
        self._settle(before)
        if self.trainer.accelerator.scaler is None:
            self._prevent(optimizer)

    def _prevent(self, optimizer: Any) -> None:
        """Makes the next `optimizer.step()` change nothing if this step is bad."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not self.late:
            for parameter in parameters if self._bad else ():
                parameter.grad = None  # optimizers leave such a parameter alone
            return
        inner = getattr(optimizer, "optimizer", optimizer)
        if getattr(inner, "_step_supports_amp_scaling", False) and not any(hasattr(p, "to_local") for p in parameters):
            inner.found_inf, inner.grad_scale = self._bad.float(), None
        else:
            self._undo = [(value, value.clone()) for value in _changed_by(inner, parameters)]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        if hasattr(inner, "found_inf"):
            del inner.found_inf, inner.grad_scale
        if not self.late:
            if self._bad and self._buffers:
                torch._foreach_copy_(self._buffers, self._buffers_before)
            return
        pairs = self._undo + list(zip(self._buffers, self._buffers_before, strict=True))
        known = {value.data_ptr() for value, _ in self._undo}
        fresh = [value for value in _changed_by(inner, []) if value.data_ptr() not in known] if self._undo else []
        pairs += [(value, torch.zeros_like(value)) for value in fresh]  # the optimizer's first step made it
        for value, before in pairs:
            if value.device == self._bad.device:  # a step counter on the host would have to wait
                value.copy_(torch.where(self._bad, before, value))
        self._undo = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.steps += 1
        self._since_log += 1
        if not self.late or control.should_log or control.should_save or control.should_evaluate:
            self._flush()
        if control.should_save:
            self.check_weights("to save")

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._flush()
        if control.should_save:
            self.check_weights("to save")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._flush()
        if self.skipped and self.skipped == self.steps:
            raise InputError(
                f"training: expected a finite loss and gradient, got none in {self.steps} steps, so that nothing was "
                f"learned; lower training.learning_rate or look at the data{self.last_checkpoint(state.global_step)}"
            )
        self.check_weights("after training")
        if self.skipped > 1 and args.process_index == 0:
            logger.warning("training: %d of %d steps were skipped, not being finite", self.skipped, self.steps)

    # What follows from the flags

    def _flush(self) -> None:
        read, self._read = self._read, None
        self._settle(read)

    def _settle(self, read: tuple[int, list[str], Tensor, Any] | None) -> None:
        """Counts, tells and perhaps stops by the flags of a step."""
        if read is None:
            return
        step, names, flags, event = read
        if event is not None:
            event.synchronize()  # of the step before: it is over, or the device has more to do
        codes = dict(zip(names, flags.tolist(), strict=True))
        self._check_teachers(codes)
        bad = [name for name, code in codes.items() if code]
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if not bad:
            return
        self.skipped += 1
        self._lost_since_log += bad != [_GRADIENT]
        what = _what(bad)
        limit = self.args.max_nonfinite_steps
        if self.in_a_row >= limit:
            raise InputError(
                f"training: expected a finite loss and gradient, got NaN or infinity in {what} in {limit} of {limit} "
                f"steps up to step {step}; lower training.learning_rate or look at the data"
                f"{self.last_checkpoint(step - limit)}"
            )
        if self.skipped == 1 and self.args.process_index == 0:
            logger.warning(
                "step %d: %s is not finite; its update is skipped, and the run stops after %d such steps in a row "
                "(training.max_nonfinite_steps)",
                *(step, what, limit),
            )

    def check_loss(self) -> None:
        """Raises InputError if a loss seen since the last step is not finite; waits for the device."""
        bad = [name for name, flag in self._flags.items() if flag]
        if bad:
            raise InputError(
                f"training: expected a finite loss, got NaN or infinity in {_what(bad)}; look at the data"
            )

    def correct(self, logs: dict[str, float]) -> None:
        """Makes `loss` the mean of the steps since the last line that had one; leaves out what is not finite."""
        good = self._since_log - self._lost_since_log
        if self._lost_since_log:
            logs["loss"] = logs["loss"] * self._since_log / good if good else math.nan
        for name in [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]:
            del logs[name]
        self._since_log = self._lost_since_log = 0


class FiniteMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` that let its `StepGuard` see what a step computes."""

    guard: StepGuard
    health: TeacherHealth

    def _watch(self) -> None:
        """Begins to watch steps and teachers; called once, by the constructor."""
        self.guard = StepGuard(self)
        self.add_callback(self.guard)
        self.health = TeacherHealth(self.teachers, self.args.process_index == 0)

    def _ask_teachers(self, batch: Batch, factors: list[float], measure: bool) -> dict[str, Any]:
        given = super()._ask_teachers(batch, factors, measure)
        outputs = given.get("teachers") or {}
        self.guard.see_teachers(outputs, batch)
        for name, output in outputs.items():
            self.health.see(name, self.taps_of(name), output, batch.teacher_images)
        return given

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        return self.guard.see_loss(super().training_step(model, inputs, num_items_in_batch))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        self.guard.see_norm(norm)
        return norm

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self.guard.begin_scoring()
        output = super().evaluation_loop(*args, **kwargs)
        self.guard.end_scoring()
        return output


def _what(bad: list[str]) -> str:
    """What is not finite, for a message: the parts of the loss, else the whole, else the gradient."""
    parts = [name.removeprefix(f"{_LOSS} ") for name in bad if name not in (_LOSS, _GRADIENT)]
    return f"the loss ({', '.join(parts)})" if parts else f"the {bad[0]}"


@torch.no_grad()
def _first_bad(value: Tensor, samples: Tensor | None, mask: bool) -> Tensor:
    """0 if `[B, ...]` is finite, else the code of the first image that is not, see `_PLACES`."""
    bad = bad_images(value, mask)
    index = bad.int().argmax()
    sample = index.new_full((), -1) if samples is None else samples.to(index.device).gather(0, index[None])[0]
    return torch.where(bad.any(), 1 + index + _PLACES * (1 + sample), torch.zeros_like(index))


def _changed_by(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> list[Tensor]:
    """The parameters, and the tensors that the optimizer keeps."""
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [local(value) for value in (*parameters, *kept)]
