"""Warns of classes that a confidence threshold leaves out."""

import logging

logger = logging.getLogger(__name__)

KEPT, PRIOR = "kept/", "prior/"
LEAST = 0.1  # of a class's part in the labels, below which its part in what is kept is told


class KeptClasses:
    """Reads `kept/TERM/CLASS` of the logs, the part of the kept positions that is of a class, and tells of each class
    once that hardly any of it is kept. Its part in the labels, `prior/TERM/CLASS`, is taken out of the logs."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def see(self, logs: dict[str, float]) -> None:
        """Looks at the means of an interval."""
        for key in [key for key in logs if key.startswith(PRIOR)]:
            prior, name = logs.pop(key), key.removeprefix(PRIOR)
            kept = logs.get(KEPT + name, 1.0)
            if kept < LEAST * prior and name not in self._told:
                self._told.add(name)
                term, _, label = name.partition("/")
                logger.warning(
                    "distill.terms.%s.options.threshold: class %s is %.2g%% of the positions that are kept, and "
                    "%.2g%% of the labels; lower the threshold, or it is forgotten",
                    *(term, label, 100 * kept, 100 * prior),
                )
