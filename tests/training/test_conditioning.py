"""Conditioned targets in a run: measured once by the teacher alone, frozen, saved, and shared by the terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cankd_hf import CanKDTrainer, LossTerm, Objective
from cankd_hf.errors import InputError
from cankd_hf.names import DISTILLER_FILE

from .test_objective import losses, segmenter
from .tiny_trainers import Images, largest_difference, teacher, trainer, weights

KINDS = ("layer", "l2", "channel", "global", "phi_s", "clip")


def term(kind: str, **settings: Any) -> LossTerm:
    usual = {"loss": "mse", "weight": 1.0, "pairs": [[-1, -1]], "conditioning": kind, "name": kind}
    return LossTerm(**{**usual, **settings})


def test_every_conditioning_trains_and_the_teacher_runs_once_more_for_each_batch_measured(tmp_path: Path) -> None:
    calls: list[int] = []
    one = teacher()
    made = trainer(
        tmp_path, teacher=one, terms=[term(kind) for kind in ("none", *KINDS)], conditioning_batches=1, logging_steps=1
    )
    one.register_forward_hook(lambda *_: calls.append(1))
    made.train()
    assert len(calls) == 1 + 2 and not made.distiller.unmeasured
    values = {kind: losses(made)[0][f"loss_{kind}"] for kind in ("none", *KINDS)}
    assert len(set(values.values())) == 6 and values["none"] == values["clip"]  # this teacher has no outliers
    assert len(made.distiller.conditioning) == 6 and not list(made.distiller.conditioning.parameters())


def test_measuring_changes_nothing_but_the_target(tmp_path: Path) -> None:
    """The same images in the same order and the same random numbers: `clip` without outliers is no conditioning."""
    made = [
        trainer(tmp_path / kind, Images(16, noisy=True), terms=[term(kind, name="mse")], conditioning_batches=1)
        for kind in ("none", "clip")
    ]
    for one in made:
        one.train()
    ours, clipped = (
        {name: value for name, value in weights(one).items() if not name.startswith("conditioning")} for one in made
    )
    limit = weights(made[1])["conditioning.teacher_t0_clip.limit"]
    assert 0 < limit < float("inf") and largest_difference(ours, clipped) == 0


def test_a_conditioned_run_resumes_bit_for_bit_with_the_statistics_it_began_with(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "conditioning_batches": 1}
    given = [term("phi_s"), term("channel", loss="cankd", options={"output_norm": "none"})]
    made = [trainer(tmp_path / name, Images(16, noisy=True), terms=given, **settings) for name in ("a", "b")]
    made[0].train()
    saved = load_file(tmp_path / "a" / "checkpoint-2" / DISTILLER_FILE)
    kept = {name for name in saved if name.startswith("conditioning.")}
    assert {name.rsplit(".", 1)[1] for name in kept} == {"matrix", "bias", "mean", "scale", "ready"}
    made[1].measure_conditioning = lambda: pytest.fail("measured again")  # type: ignore[method-assign]
    made[1].train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert largest_difference(weights(made[0]), weights(made[1])) == 0


def test_terms_that_ask_for_the_same_share_the_conditioned_map(tmp_path: Path) -> None:
    given = [term("phi_s", name="a"), term("phi_s", name="b", loss="cosine"), term("none", name="c")]
    made = trainer(tmp_path, terms=given, conditioning_batches=1)
    made.measure_conditioning()
    ran: list[int] = []
    (module,) = made.distiller.conditioning.values()
    module.register_forward_hook(lambda *_: ran.append(1))
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    outputs = made.source(batch)
    made.distiller(**batch, teachers=outputs)
    assert len(ran) == 1
    connected = made.distiller.connect([torch.zeros(8, 16, 2, 2)] * 4, outputs)
    conditioned, plain = connected["s3t0"], connected["s3t0/"]
    assert torch.equal(conditioned[0], plain[0]) and not torch.equal(conditioned[1], plain[1])


def test_statistics_survive_a_new_objective_that_asks_for_the_same(tmp_path: Path) -> None:
    made = trainer(tmp_path, terms=[term("channel")], conditioning_batches=1)
    made.train()
    before = weights(made)["conditioning.teacher_t0_channel.mean"]
    made.set_objective(Objective(1.0, [term("channel", loss="cosine"), term("global")]))
    assert torch.equal(weights(made)["conditioning.teacher_t0_channel.mean"], before)
    assert [level.name(kind) for (level, _), kind in zip(made.distiller.unmeasured, ["global"], strict=True)] == [
        "teacher_t0_global"
    ]
    made.train()
    assert not made.distiller.unmeasured


def test_what_cannot_be_conditioned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="terms.kl.conditioning: is of maps, and kl reads logits; leave it out"):
        trainer(tmp_path, teacher=segmenter(), terms=[LossTerm(loss="kl", conditioning="l2")])
    made = trainer(tmp_path, terms=[term("channel")])
    made.train_dataset = None
    with pytest.raises(InputError, match="train_dataset: expected one to measure the conditioning's statistics on"):
        made.measure_conditioning()
    with pytest.raises(InputError, match="conditioning_batches: expected a whole number of at least 1, got 0"):
        trainer(tmp_path, conditioning_batches=0)


def conditioned_trainer(folder: Path, batch: int) -> CanKDTrainer:
    """With statistics that are measured on all 16 images, and a weight by share, by two processes with half the batch
    or by one."""
    given = [term("phi_s"), term("global"), term("clip", loss="cosine"), term("l2", weight={"share": 0.2})]
    return trainer(folder, terms=given, conditioning_batches=2, per_device_train_batch_size=batch)
