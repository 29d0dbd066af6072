"""The `student:` section of a recipe. Does not import transformers, so that recipes are checked quickly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from annotated_types import Len

from cankd_hf.config.advice import Say
from cankd_hf.config.declared import parameters
from cankd_hf.config.schema import Section


@dataclass
class StudentConfig(Section):
    """A student, defined by exactly one of `model`, `config` and `backbone`.

    Args:
        model: a local folder or Hub id of a whole model (SegFormer, UperNet, one of ours, ...); a head for another
            number of classes is newly initialised.
        config: a whole model with random weights, as its configuration's fields with `model_type`; its
            `backbone_config` may be `{pretrained: SOURCE, key: value}`, a backbone with pretrained weights.
        backbone: the backbone of a feature pyramid; anything that `load_backbone` takes.
        fpn: settings of the pyramid on that backbone, see `FPNConfig`.
        taps: modules whose outputs are its feature maps: `auto` or module paths.
        inherit: parts initialised with the teacher's weights, such as `[neck, head]`, where name and shape match;
            marked in results and model card.
        tokenizer: for a detector with class names as text (Grounding DINO): a local folder or Hub id with its
            tokenizer; default: that of `model`.
        revision: branch, tag or commit on the Hub, of `model` or `backbone`.
        trust_remote_code: whether code of the repository may run; not needed for students of this package.
    """

    place: ClassVar[str] = "student"
    one_of: ClassVar[tuple[str, ...]] = ("model", "config", "backbone")

    model: str | None = None
    config: dict[str, Any] | None = None
    backbone: str | dict[str, Any] | None = None
    fpn: dict[str, Any] = field(default_factory=dict)
    taps: str | Annotated[list[str], Len(1), Say(fix="name at least one, or write auto")] = "auto"
    inherit: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def problems(self) -> Iterator[tuple[str, str]]:
        """Problems beyond types and ranges."""
        if self.fpn and self.backbone is None:
            yield "fpn", "settings of a pyramid count for student.backbone only; remove them"

    def accepted(self) -> dict[str, dict[str, Any]]:
        """Names and types of the settings in `fpn`."""
        if self.backbone is None:
            return {}
        found = parameters("cankd_hf.models.fpn.configuration_cankd_fpn", "FPNConfig")
        left_out = ("backbone_config", "semantic_loss_ignore_index")
        return {"fpn": {key: kind for key, kind in found.items() if key not in left_out}}

    check = Section.raise_problems
