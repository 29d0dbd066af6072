"""One step, read in trainer, distiller and loss; and what surrounds it."""
