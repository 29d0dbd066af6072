"""Facts about a saved student and its training, as plain data for the model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerState

from cankd_hf.config.distill import Share
from cankd_hf.hub.facts import hardware, hub_id
from cankd_hf.names import TORCHVISION
from cankd_hf.tasks import Task
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.monitoring.energy import EnergyMeter


def run_facts(
    args: CanKDConfig,
    state: TrainerState,
    task: Task,
    distiller: Distiller,
    teachers: Mapping[str, Teacher],
    inherited: Sequence[str],
    energy: EnergyMeter,
    best: bool,
) -> dict[str, Any]:
    """All facts that a card may state; `best`: the saved weights may be those of the best checkpoint."""
    student = distiller.student
    manifests = {name: _shown(teacher.manifest()) for name, teacher in teachers.items()}
    step = state.global_step
    if best and args.load_best_model_at_end and state.best_global_step:
        step = state.best_global_step
    joules = energy.facts(state)
    return {
        "task": task.name,
        "metric": task.metric,
        "pipeline_tag": task.pipeline_tag,
        "start": hub_id(student.name_or_path),
        "parameters": student.num_parameters(),
        "teacher": next(iter(manifests.values()), None),
        **({"teachers": manifests} if len(manifests) > 1 else {}),
        "inherited": list(inherited),
        "task_weight": distiller.objective.task_weight,
        "terms": _terms(distiller),
        "step": step,
        "planned_steps": state.max_steps,
        "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "seed": args.seed,
        "hardware": hardware(args.device),
        "processes": args.world_size,
        **_wall_clock(state),
        **({} if joules is None else {"energy": joules}),
        "scores": _scores(state.log_history, step),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _shown(manifest: dict[str, Any]) -> dict[str, Any]:
    """A teacher's manifest with only the last part of a local path, which means nothing on another machine."""
    if hub_id(manifest["model"]) is None and not manifest["model"].startswith(TORCHVISION):
        local = {"local": True} if Path(manifest["model"]).is_dir() else {}
        return {**manifest, "model": Path(manifest["model"]).name, **local}
    return manifest


def _terms(distiller: Distiller) -> list[dict[str, Any]]:
    terms = []
    for term in distiller.objective.terms:
        pairs = []
        for item in distiller.placed:
            if item.term is not term:
                continue
            pair: dict[str, Any] = {"weight": item.weight}
            if item.pair is not None:
                ours = distiller.levels[item.pair.student]
                theirs = distiller.teachers[item.teacher].levels[item.pair.teacher]
                pair = {
                    "student_stride": round(ours.stride, 2),
                    "teacher_stride": round(theirs.stride, 2),
                    "student_tap": ours.tap,
                    "teacher_tap": theirs.tap,
                    **pair,
                }
            pairs.append(pair)
        kept = {"name": term.label, "loss": term.loss_name, "warmup": term.warmup, "decay": term.decay}
        named: dict[str, Any] = {"teacher": term.teacher} if len(distiller.teachers) > 1 else {}
        named |= {"share": term.weight.share} if isinstance(term.weight, Share) else {}
        named |= {"fade": term.fade} if term.fade else {}
        named |= {"conditioning": term.conditioning} if term.conditioning != "none" else {}
        terms.append({**kept, **named, "options": term.options, "pairs": pairs})
    return terms


def _wall_clock(state: Any) -> dict[str, float]:
    """Seconds of training; empty if the run was resumed and only its last part was timed."""
    counted = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
    if counted:
        return {"seconds": counted[-1]}
    ends = [entry for entry in state.log_history if "train_runtime" in entry]
    if not ends:
        return {}
    seconds = ends[-1]["train_runtime"]
    timed = round(seconds * ends[-1].get("train_steps_per_second", 0.0))
    # The logged rate is rounded, to within 0.05%.
    whole = abs(timed - state.global_step) <= 1 + 0.0005 * seconds
    return {"seconds": seconds} if whole else {}


def _scores(history: list[dict[str, float]], step: int) -> dict[str, float]:
    """Validation scores at this step; the last ones if there are several."""
    found = [entry for entry in history if entry.get("step") == step and any(key.startswith("eval_") for key in entry)]
    timing = ("runtime", "per_second")
    return {
        key.removeprefix("eval_"): value
        for key, value in (found[-1] if found else {}).items()
        if key.startswith("eval_") and not key.endswith(timing)
    }
