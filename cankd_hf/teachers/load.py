"""Loads a `Teacher` from a name, a folder or a model in memory."""

import re
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.data.common.seeds import seeded
from cankd_hf.errors import InputError
from cankd_hf.features.auto_taps import quiet_forward
from cankd_hf.features.inputs import (
    FIXED_SIZE,
    PATCHED,
    ImageStats,
    image_stats,
    input_rule,
    is_timm_name,
    timm_folder_stats,
    timm_stages,
    timm_stats,
)
from cankd_hf.features.truncate import drop_unread_stages
from cankd_hf.names import RANDOM_WEIGHTS
from cankd_hf.teachers.teacher import Teacher

# Forms in which a teacher may be passed.
TeacherLike = str | Path | nn.Module | TeacherConfig
_STAGE = re.compile(r"stem|stage\d+")


TIMM_STAGES = [f"stage{index}" for index in range(100)]  # timm counts its maps from 0


def load_teacher(
    teacher: TeacherLike, *, seed: int | None = None, head: str | None = None, **overrides: Any
) -> Teacher:
    """Loads any vision model as a teacher.

    Args:
        teacher: a local folder or Hub id (a backbone, a plain ViT, or a dense-prediction model of `transformers` or
            ours), `timm/NAME`, `torchvision/NAME`, a model in memory (frozen and cast in place), a `TeacherConfig`, or
            a `Teacher`.
        seed: of random weights (`config` instead of `model`): the same weights in every process and run, without
            changing the program's random numbers. None draws them from those numbers. Pretrained weights ignore it.
        head: auto class, such as `AutoModelForImageClassification`, of models that are loaded with their head where
            they have it, and not as backbones: for losses on their logits. Stages named as taps are of a backbone.
        **overrides: fields of `TeacherConfig`.

    Returns:
        The teacher, on the CPU; move it with `.to(device)`.

    Raises:
        InputError: if it is not found, its weights do not match (missing keys are listed), or a tap does not exist.
    """
    if isinstance(teacher, Teacher):
        if overrides:
            raise InputError(f"teacher: expected no options beside a Teacher, got {', '.join(sorted(overrides))}")
        return teacher
    config = teacher if isinstance(teacher, TeacherConfig) else TeacherConfig()
    unknown = sorted(set(overrides) - {field.name for field in fields(TeacherConfig)})
    if unknown:
        raise InputError([f"teacher.{name}: no such option" for name in unknown])
    config = replace(config, **overrides)
    if isinstance(teacher, nn.Module):
        replace(config, model="in memory", config=None).check()
        known = getattr(teacher, "config", None)  # what `from_pretrained` loaded knows where it came from
        config = replace(config, revision=config.revision or getattr(known, "_commit_hash", None))
        return Teacher(teacher, config, name=getattr(known, "_name_or_path", None) or "")
    if isinstance(teacher, (str, Path)):
        config = replace(config, model=str(teacher))
    config.check()
    if config.from_torchvision:
        return _torchvision_teacher(config)
    drawn = None if config.model is not None else seed
    with nullcontext() if drawn is None else seeded(drawn):
        model, stats = _build(config, head)
    if _stages(config.taps) is not None:
        config = replace(config, taps="auto")
    if config.model is not None and not is_timm_name(config.model):
        from cankd_hf.models.pretrained import hub_commit

        config = replace(config, revision=hub_commit(config.model, config.revision) or config.revision)
    return Teacher(model, config, stats, name=config.model or RANDOM_WEIGHTS, seed=drawn)


def _torchvision_teacher(config: TeacherConfig) -> Teacher:
    from cankd_hf.models.torchvision_teachers import load_torchvision

    model, weights = load_torchvision(config.model or "", config.weights, config.revision)
    taps = model.taps if config.taps == "auto" else config.taps
    stats = ImageStats(model.image_mean, model.image_std, "torchvision")
    return Teacher(model, replace(config, taps=taps, revision=weights), stats, name=config.model or "")


def _build(config: TeacherConfig, head: str | None) -> tuple[nn.Module, ImageStats]:
    """The model with only the requested stages, and its input normalisation."""
    from cankd_hf.models import register
    from cankd_hf.models.backbones import load_backbone, load_config, timm_source
    from cankd_hf.models.configs import config_from_dict
    from cankd_hf.models.pretrained import dense_or_plain_class, load_dense_or_plain

    register()  # our own students may be teachers
    stages = _stages(config.taps)
    name = config.model or ""
    hub: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if is_timm_name(name):
        name = "timm/" + name.removeprefix("timm/")
        found = _stage_indices(stages, TIMM_STAGES) or timm_stages(name.removeprefix("timm/"))
        return load_backbone(name, out_indices=found), image_stats(name)
    if Path(name).is_dir() and (files := timm_source(name)) is not None:  # of timm, not of transformers
        found = _stage_indices(stages, TIMM_STAGES) or timm_stages(files[0])
        return load_backbone(name, out_indices=found), timm_folder_stats(name)
    hf_config = load_config(name, hub) if name else config_from_dict(config.config or {}, "teacher.config")
    stats = image_stats(name, config.revision) if name else ImageStats()
    auto_class = dense_or_plain_class(hf_config, head if stages is None else None)
    if auto_class is not None:
        return load_dense_or_plain(config.model, hf_config, auto_class, **hub), stats
    source = name or dict(config.config or {})
    timm = hf_config.model_type == "timm_backbone"
    indices = _stage_indices(stages, TIMM_STAGES if timm else hf_config.stage_names)
    model = load_backbone(source, out_indices=indices or _pyramid_stages(hf_config), **hub)
    if timm:
        stats = timm_stats(hf_config.backbone)
    size = input_rule(model).size((64, 64))
    drop_unread_stages(model, lambda: list(quiet_forward(model, size).feature_maps))
    return model, stats


def _stages(taps: str | list[str]) -> list[str] | None:
    """The taps if all of them are names of backbone stages ("stage6", "stem"), else None."""
    named = [taps] if isinstance(taps, str) else list(taps)
    return named if all(_STAGE.fullmatch(tap) for tap in named) else None


def _stage_indices(stages: list[str] | None, names: list[str]) -> list[int] | None:
    """Indices of the named stages among all stages of a backbone."""
    unknown = [stage for stage in stages or () if stage not in names]
    if unknown:
        raise InputError(f"teacher.taps: expected stages among {', '.join(names)}, got {', '.join(unknown)}")
    return None if stages is None else sorted(names.index(stage) for stage in stages)


def _pyramid_stages(config: Any) -> list[int] | None:
    """All stages of a hierarchical backbone configured to return only the last; else None, no change."""
    one_stride = config.model_type in PATCHED or config.model_type in FIXED_SIZE - {"hiera"}
    if one_stride or len(config.out_indices) > 1:
        return None
    if config.model_type == "timm_backbone":
        return timm_stages(config.backbone)
    return [index for index, stage in enumerate(config.stage_names) if stage != "stem"]
