"""What a recipe says about its student; light, so that a recipe is checked without importing transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cankd_hf.errors import InputError


@dataclass
class StudentConfig:
    """A student. Exactly one of `model`, `config` and `backbone` says what it is.

    Args:
        model: a local folder or Hub id of a whole model (SegFormer, UperNet, one of ours, ...); a head of another
            class count starts anew.
        config: a whole model with random weights, as its configuration's fields with `model_type`; its
            `backbone_config` may be `{pretrained: SOURCE, key: value}`, a backbone that starts with its weights.
        backbone: the backbone under a pyramid: whatever `load_backbone` takes.
        fpn: settings of the pyramid on that backbone, see `FPNConfig`.
        taps: where its feature maps are taken, `auto` or module paths.
        inherit: parts that start from the teacher's weights, such as `[neck, head]`, copied where name and shape
            agree; marked in results and card.
        tokenizer: for a detector that reads its class names (Grounding DINO): a local folder or Hub id with its
            tokenizer; default: that of `model`.
        revision: branch, tag or commit on the Hub, of `model` or `backbone`.
        trust_remote_code: whether code of the repository may run; never needed for our own students.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    backbone: str | dict[str, Any] | None = None
    fpn: dict[str, Any] = field(default_factory=dict)
    taps: str | list[str] = "auto"
    inherit: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raises `InputError` unless exactly one source is given, and `fpn` only where it counts."""
        given = [name for name in ("model", "config", "backbone") if self.__dict__[name] is not None]
        problems = []
        if len(given) != 1:
            got = " and ".join(given) or "none"
            problems.append(f"student: expected exactly one of model, config and backbone, got {got}; keep one")
        if self.fpn and given != ["backbone"]:
            problems.append("student.fpn: settings of a pyramid count for student.backbone only; remove them")
        if problems:
            raise InputError(problems)
