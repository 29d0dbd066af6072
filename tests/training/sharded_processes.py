"""Run by torchrun from test_sharding: `fsdp`, `rest` (what is longer) or `deepspeed`, in two processes on the CPU.

accelerate shards on accelerators only: the arguments say here that there are several GPUs, after the processes have
found each other by gloo. All that follows is what happens on GPUs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from cankd_hf.errors import InputError
from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.trainer import CanKDTrainer
from tests.processes import leave_together
from tests.training import tiny_trainers
from tests.training.detector_trainers import detector_trainer
from tests.training.tiny_trainers import Images, largest_difference, student, teacher, terms, trainer

folder, part = Path(sys.argv[1]), sys.argv[2]
deepspeed = part == "deepspeed"
rank = int(os.environ["RANK"])
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
BEST |= {"metric_for_best_model": "miou"}
ZERO2 = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
ZERO2 |= dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping"), "auto")
found: dict[str, Any] = {}


class OnGpus(CanKDConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def made(name: str, kind: str = "FULL_STATE_DICT", **settings: Any) -> CanKDTrainer:
    how = {"deepspeed": dict(ZERO2)} if deepspeed else {"fsdp": True, "fsdp_config": {"state_dict_type": kind}}
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, **how, **settings}
    return trainer(folder / name, Images(24, noisy=True), **settings)


def whole(trained: CanKDTrainer) -> dict[str, torch.Tensor]:
    state = trained.distiller.state_dict()
    return {name: getattr(value, "full_tensor", lambda v=value: v)().detach().clone() for name, value in state.items()}


def saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    torch.distributed.barrier()
    state = {f"student.{name}": value for name, value in load_file(checkpoint / "model.safetensors").items()}
    return {**state, **load_file(checkpoint / "distiller.safetensors")}


def equal_to_one_process() -> None:
    """Ranks that start apart must be brought together."""
    one = made("sgd")
    if rank == 1:
        with torch.no_grad():
            for parameter in one.model.parameters():
                parameter.add_(0.1)
    if not deepspeed:
        found["before"] = one.evaluate(Images(7))["eval_miou"]
    one.train()
    found["sharded"] = one.is_deepspeed_enabled if deepspeed else type(one.model).__name__
    found["measured"] = [key for key in one.state.log_history[0] if key.startswith(("raw_", "branch_share"))]
    found["after"] = one.evaluate(Images(7))["eval_miou"]
    state = {name: value.contiguous() for name, value in whole(one).items()}
    save_file(state, folder / f"sgd{rank}.safetensors")


def checkpoints(kind: str) -> None:
    """The best model is loaded at the end, the student in its folder loads anywhere, and a run resumes bit for bit."""
    run = made(kind, kind, eval_dataset=Images(7), **ADAM, **BEST)
    run.train()
    best = Path(str(run.state.best_model_checkpoint))
    found[f"best {kind}"] = largest_difference(saved(best), whole(run))
    found[f"score {kind}"] = run.evaluate()["eval_miou"] - run.state.best_metric
    FPNForSemanticSegmentation.from_pretrained(best)
    run.save_model(str(folder / f"final {kind}"))
    torch.distributed.barrier()
    last = load_file(folder / f"final {kind}" / "model.safetensors")
    found[f"final {kind}"] = largest_difference(last, load_file(best / "model.safetensors"))
    resumed = made(f"resumed {kind}", kind, model=student(seed=5), **{**ADAM, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(folder / kind / "checkpoint-2"))
    found[f"resumed {kind}"] = largest_difference(saved(folder / kind / "checkpoint-4"), whole(resumed))


def rest() -> None:
    checkpoints("SHARDED_STATE_DICT")
    warm = made("warm", task_weight=0.0, terms=terms(warmup=2.0))
    warm.train()
    found["warm"] = [entry["loss"] for entry in warm.state.log_history if "loss" in entry]
    # Without momentum there is no state to load; the rate of the schedule must be there all the same.
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 2}
    sgd = made("plain", save_strategy="steps", save_steps=1, **settings)
    sgd.train()
    again = made("plain again", **settings)
    again.train(resume_from_checkpoint=str(folder / "plain" / "checkpoint-2"))
    found["plain"] = largest_difference(whole(sgd), whole(again))
    detr = detector_trainer(folder / "detr", "conditional_detr", fsdp=True, per_device_train_batch_size=4, bf16=True)
    detr.train()
    found["bf16"] = [entry["loss"] for entry in detr.state.log_history if "loss" in entry]
    other = teacher(seed=9)
    found["refused"] = [
        refused(lambda: sgd.set_objective(sgd.distiller.objective)),
        refused(lambda: made("names", fsdp_config={"transformer_layer_cls_to_wrap": ["NoSuchLayer"]}).train()),
        refused(lambda: made("small", fsdp_config={"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 9})),
        refused(lambda: made("old", fsdp_config={"version": 1})),
        refused(lambda: made("t", teacher=other).train(str(folder / "plain" / "checkpoint-2"))),
    ]
    tiny_trainers.CanKDConfig = CanKDConfig
    del os.environ["ACCELERATE_USE_FSDP"]  # accelerate leaves it behind
    ddp = made("ddp", fsdp=None, fsdp_config=None, save_strategy="steps", save_steps=1)
    ddp.train()
    found["refused"].append(refused(lambda: ddp.train(str(folder / "plain" / "checkpoint-2"))))
    tiny_trainers.CanKDConfig = OnGpus
    found["refused"].append(refused(lambda: made("to fsdp").train(str(folder / "ddp" / "checkpoint-2"))))


def refused(work: Any) -> str:
    try:
        work()
    except InputError as error:
        return str(error)
    return "nothing"


if not deepspeed:
    tiny_trainers.CanKDConfig = OnGpus
if part == "rest":
    rest()
else:
    equal_to_one_process()
    checkpoints("FULL_STATE_DICT")
if rank == 0:
    (folder / "found.json").write_text(json.dumps(found))
leave_together(folder, rank)
