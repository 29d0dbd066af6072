"""ADE20K, 150 classes: `images/training/ADE_train_*.jpg` and `annotations/training/*.png`, where 0 is void."""

import csv
from pathlib import Path

from cankd_hf.data.common.files import outside, read_lines, shown
from cankd_hf.data.common.labels import Labels
from cankd_hf.data.layouts.base import Found, Tree
from cankd_hf.data.layouts.images_masks import OFFERED, paired
from cankd_hf.data.layouts.names import stem_of
from cankd_hf.data.layouts.pairs import pairs_of
from cankd_hf.errors import InputError

# The first of the names in its objectInfo150.txt, where the set is without that file.
NAMES = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, "
    "earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, "
    "mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, "
    "base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, "
    "refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway, "
    "river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove, "
    "palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, "
    "truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, "
    "apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, "
    "fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, "
    "tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, "
    "bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, "
    "ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag"
)


class Ade20k:
    """ADE20K as the scene parsing benchmark gives it."""

    name = "ADE20K"

    def find(self, tree: Tree, need: str | None) -> Found | None:
        """The pairs, if there is its list of classes or the images are called as its are."""
        table = tree.find("objectInfo150.txt")
        named = any(stem_of(names[0]).startswith(("ADE_train_", "ADE_val_")) for names in tree.images.values())
        if table is None and not named:
            return None
        pairs = pairs_of(tree) if need in OFFERED else {}
        if not pairs:
            return None
        names, source = (
            (_names(tree, table), table) if table else (NAMES.split(", "), "ADE20K, the 150 classes of its benchmark")
        )
        return paired(self.name, tree, pairs, need, Labels(dict(enumerate(names)), reduce_labels=True), source)


def _names(tree: Tree, table: str) -> list[str]:
    """The names in objectInfo150.txt: `Idx Ratio Train Val Stuff Name`, between tabs, names with synonyms."""
    path: Path = tree.path(table)
    if problems := outside(tree.root, [path]):
        raise InputError(problems)
    rows = [row for row in csv.reader(read_lines(path), delimiter="\t") if row]
    names = [row[-1].split(",")[0].strip() for row in rows[1:]]
    twice = {name for name in names if names.count(name) > 1}
    names = [row[-1].strip() if name in twice else name for row, name in zip(rows[1:], names, strict=True)]
    if not names or rows[0][-1].strip().lower() != "name" or len(set(names)) < len(names):
        raise InputError(
            f"{path}: expected a table `Idx Ratio Train Val Stuff Name` between tabs, got {shown(rows[:1])}"
        )
    return names
