"""A run of a comparison, and what an arm reached with a budget and seed."""

from dataclasses import dataclass

from cankd_hf.compare.records import Record
from cankd_hf.config.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """One run of the train command."""

    key: str
    name: str  # for people
    recipe: Recipe


@dataclass
class Outcome:
    """What an arm reached with one budget and seed.

    Attributes:
        record: of its accepted run; None if it is still to be run, or failed.
        budget: seconds that it might spend; None where steps are equal.
        charged: seconds that count: its own and, where they are charged, its teacher's.
        tried: number of runs it took.
        failed: why there is no record.
    """

    record: Record | None = None
    budget: float | None = None
    charged: float = 0.0
    tried: int = 0
    failed: str = ""

    def off(self, tolerance: float) -> bool:
        """Whether it missed its budget."""
        return self.budget is not None and abs(self.charged / self.budget - 1) > tolerance
