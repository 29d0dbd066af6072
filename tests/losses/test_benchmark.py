"""The loss benchmark: it runs, its numbers are sane, and it refuses what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cankd_hf.benchmark import main
from cankd_hf.benchmark.loss import Row, Size, flops, growth, naive_bytes
from cankd_hf.benchmark.measure import Machine, peak_extra
from cankd_hf.losses import LOSSES, LogitsLoss
from cankd_hf.losses.affinities import AFFINITIES

CPU = torch.device("cpu")


def test_quick_run_prints_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    assert main(["loss", "--quick", "--sizes", "6x10x8,12x20x8", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert [row["affinity"] for row in written["rows"]] == [*AFFINITIES, *AFFINITIES]
    assert all(row["ours"] > 0 and row["naive"] > 0 and row["memory"] > 0 for row in written["rows"])
    assert written["machine"]["flops"] > 0
    text = capsys.readouterr().out
    assert "CanKD loss, forward + backward" in text and "12x20 C8 B2" in text


def test_what_does_not_fit_is_skipped_with_its_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cankd_hf.benchmark.loss.free_memory", lambda device: 1 << 30)
    assert main(["loss", "--quick", "--sizes", "50x84x32", "--affinities", "concatenation"]) == 0
    assert "naive would need 2.2 GiB" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_bad_arguments_are_said_together(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["loss", "--sizes", "6by10", "--affinities", "dot", "--batch", "0", "--dtype", "int8"]
    assert main(args) == 2
    said = [line.split(":")[1].strip() for line in capsys.readouterr().err.splitlines()]
    assert said == ["--sizes", "--affinities", "--batch", "--dtype"]


RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET |= {"layer_type": "basic", "out_indices": [1, 2]}


class Logits(LogitsLoss):
    """A loss on logits."""

    def compute(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (student - teacher).square().mean()


@pytest.mark.parametrize("several", [False, True])
def test_step_and_teacher_time_one_teacher_and_several(
    several: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 8, "head_channels": 8}
    recipe: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "data": {"path": "shapes", "generated": {"train": 4, "validation": 2, "size": 64}, "image_size": [64, 64]},
        "student": {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head_channels": 8}},
        "training": {"per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True},
    }
    if several:
        monkeypatch.setitem(LOSSES, "instance_mse", Logits)
        recipe["teachers"] = {"plain": {"config": RESNET}, "head": {"config": {**head, "num_labels": 6}}}
        terms = [{"teacher": "plain", "pairs": [[0, 0]]}, {"teacher": "head", "loss": "instance_mse"}]
        recipe["distill"] = {"terms": terms}
    else:
        recipe["teacher"] = {"config": RESNET}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    assert main(["step", str(file), "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    parts = ("teacher forward", "connectors + loss + clip", "whole step")
    for words in (*parts, "Overhead of distillation", "Peak memory"):
        assert words in shown, words
    assert main(["teacher", str(file), "--repeats", "1", "--no-compile"]) == 0
    shown = capsys.readouterr().out
    for title in ("teacher plain forward", "teacher head forward") if several else ("teacher forward",):
        assert title in shown and "early stop" in shown


def test_counts() -> None:
    size = Size(batch=2, channels=256, height=100, width=168)
    assert size.keys == 50 * 84
    # 10 N C^2: four for keys and values, six for the mix
    assert flops(size, "dot_product") == 2 * 10 * 16800 * 256**2
    assert naive_bytes(size, "dot_product") == 3 * 4 * 2 * 16800 * 4200
    assert naive_bytes(size, "concatenation") > 200 << 30


def test_growth_exponent() -> None:
    rows = [Row("50x84 C256 B2", "gaussian", 4200, ours=1.0), Row("200x336 C256 B2", "gaussian", 67200, ours=16.0)]
    assert growth(rows, "gaussian") == pytest.approx(1.0)
    assert growth(rows[:1], "gaussian") is None


def test_floor_is_the_longer_of_computing_and_moving() -> None:
    machine = Machine("a machine", flops=10.0, bandwidth=5.0)
    assert machine.floor(flops=20, size=5) == 2 and machine.floor(flops=20, size=50) == 10


def test_peak_counts_what_lives_at_once() -> None:
    def run() -> None:
        torch.empty(1 << 20)
        a = torch.empty(1 << 20)
        b = torch.empty(1 << 18)
        del a, b

    assert peak_extra(run, CPU) == pytest.approx(5 << 20, rel=0.01)


def test_the_loss_stays_within_its_memory() -> None:
    """At most 1.5 times its two input maps, gradient of the student included."""
    from cankd_hf.losses import CanKDLoss

    loss = CanKDLoss(64)
    student, teacher = torch.randn(2, 64, 96, 128, requires_grad=True), torch.randn(2, 64, 96, 128)

    def run() -> None:
        loss(student, teacher).backward()

    run()
    student.grad = None
    assert peak_extra(run, CPU) <= 1.5 * 2 * student.numel() * 4
