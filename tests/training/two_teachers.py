"""A toy in which two teachers, each of one kind of label, give one student what neither gives alone.

    python -m tests.training.two_teachers [--seeds 5] [--steps 500]

Each picture has one of three shapes and stripes of one of four directions, drawn independently. One teacher was
trained to tell the shapes, the other the stripes; neither tells what the other knows. Students learn from the last
map of one or of both without a label, and are probed as `cankd probe` does: a linear classifier of the mean of their
frozen last map.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ResNetBackbone, ResNetConfig, set_seed

from cankd_hf import CanKDConfig, CanKDTrainer, LossTerm, load_teacher
from cankd_hf.data.generated import _outline
from cankd_hf.probe.features import Frozen
from cankd_hf.probe.kinds import LinearClassification

PIXELS = 48
OUTLINES = (1, 2, 5)  # disc, ring, star
KINDS = {"shape": len(OUTLINES), "stripes": 4}  # number of classes
ARMS = {"shape": ("shape",), "stripes": ("stripes",), "both": ("shape", "stripes")}


class Pictures(Dataset):
    """Pictures [3, 48, 48] in memory, drawn from a seed; samples have no labels."""

    def __init__(self, count: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        labels = {kind: random.integers(0, classes, count) for kind, classes in KINDS.items()}
        drawn = [_picture(random, *pair) for pair in zip(labels["shape"], labels["stripes"], strict=True)]
        self.images = torch.from_numpy(np.stack(drawn))
        self.labels = {kind: torch.from_numpy(values) for kind, values in labels.items()}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index]}


def _picture(random: np.random.Generator, shape: int, stripes: int) -> np.ndarray:
    """Two random colours, the outline between them, and faint stripes and noise over both."""
    y, x = np.mgrid[0:PIXELS, 0:PIXELS] / PIXELS
    angle = np.pi * (stripes + random.uniform(-0.25, 0.25)) / KINDS["stripes"]
    waves, phase = random.uniform(4, 8), random.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    place, radius = random.uniform(0.35, 0.65, 2) * PIXELS, random.uniform(0.25, 0.4)
    inside = _outline(random, OUTLINES[shape], PIXELS, radius, place)
    figure, ground = random.uniform(-1, 1, (2, 3, 1, 1))
    signs, noise = random.choice([-1, 1], (3, 1, 1)), random.normal(0, 1, (3, PIXELS, PIXELS))
    return (np.where(inside, figure, ground) + 0.25 * (wave * signs + noise)).astype(np.float32)


def network(width: int, seed: int) -> ResNetBackbone:
    """A thin ResNet with one map of stride 16."""
    set_seed(seed)
    sizes = [width, 2 * width, 4 * width]
    return ResNetBackbone(
        ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=[1, 1, 1], layer_type="basic", out_indices=[3])
    )


def trained_teacher(data: Pictures, kind: str, steps: int, seed: int) -> ResNetBackbone:
    """A network trained to tell one kind of label, without its linear classifier."""
    model, classes = network(16, seed), KINDS[kind]
    head, draw = nn.Linear(64, classes), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        picked = torch.randint(len(data), (64,), generator=draw)
        logits = head(model(data.images[picked]).feature_maps[0].mean((2, 3)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, data.labels[kind][picked]).backward()
        optimizer.step()
        schedule.step()
    return model


def distilled(data: Pictures, teachers: Mapping[str, ResNetBackbone], steps: int, seed: int) -> ResNetBackbone:
    """A student that learned from the maps of these teachers, without labels."""
    student, terms = network(12, 10 + seed), list[LossTerm]()
    for name in teachers:
        terms.append(LossTerm(loss="mse", teacher=name, name=name, weight=1.0, conditioning="phi_s"))
    with tempfile.TemporaryDirectory() as folder:
        args = CanKDConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            weight_decay=0.02,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            save_strategy="no",
            logging_steps=steps,
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
            use_cpu=True,
            seed=seed,
        )
        frozen = {name: load_teacher(model) for name, model in teachers.items()}
        CanKDTrainer(student, teachers=frozen, args=args, terms=terms, task_weight=0.0, train_dataset=data).train()
    return student


def probed(model: ResNetBackbone, known: Pictures, asked: Pictures) -> dict[str, float]:
    """Accuracies of linear classifiers of the mean of its map, for each kind of label."""
    frozen = Frozen(load_teacher(model), (PIXELS, PIXELS))
    features, others = (frozen(data.images).mean((2, 3)) for data in (known, asked))
    found = {}
    for kind, classes in KINDS.items():
        probe = LinearClassification(classes, -100)
        probe.fit(features, known.labels[kind], torch.arange(len(known)))
        found[kind] = float((probe.votes(others).argmax(1) == asked.labels[kind]).float().mean())
    return found


class Interval(NamedTuple):
    """A mean over seeds and its 95% interval by Student's t."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def interval(values: Sequence[float]) -> Interval:
    """The mean of values of several seeds."""
    mean, half = float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)
    half *= float(t.ppf(0.975, len(values) - 1))
    return Interval(mean, mean - half, mean + half)


def scores(seeds: int, steps: int, teacher_steps: int) -> dict[str, list[dict[str, float]]]:
    """Accuracies by kind of label, for the teachers and for each arm and seed."""
    data, known, asked = Pictures(4096, 0), Pictures(512, 1), Pictures(1024, 2)
    lengths = {"shape": 2 * teacher_steps, "stripes": teacher_steps}
    teachers = {kind: trained_teacher(data, kind, lengths[kind], seed) for seed, kind in enumerate(KINDS, 1)}
    found = {f"teacher of {kind}": [probed(model, known, asked)] for kind, model in teachers.items()}
    for arm, names in ARMS.items():
        students = (distilled(data, {name: teachers[name] for name in names}, steps, seed) for seed in range(seeds))
        found[arm] = [probed(student, known, asked) for student in students]
    return found


def differences(found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[tuple[str, str], Interval]:
    """The student of both minus that of one, paired by seed, for each (arm, kind of label)."""
    return {
        (arm, kind): interval([a[kind] - b[kind] for a, b in zip(found["both"], found[arm], strict=True)])
        for arm in KINDS
        for kind in KINDS
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table of the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--teacher-steps", type=int, default=300)
    options = parser.parse_args(argv)
    found = scores(options.seeds, options.steps, options.teacher_steps)
    print(f"| | {' | '.join(KINDS)} |\n|---|---|---|")
    for name, rows in found.items():
        cells = [interval([row[kind] for row in rows]) if len(rows) > 1 else f"{rows[0][kind]:.3f}" for kind in KINDS]
        print(f"| {name} | {' | '.join(map(str, cells))} |")
    for (arm, kind), value in differences(found).items():
        print(f"both minus {arm} alone, probe of {kind}: {value}")


if __name__ == "__main__":
    main()
