"""From a trained student to one that others load: which files, which card, and the push."""
