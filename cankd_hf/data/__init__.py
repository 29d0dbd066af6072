"""Images and masks: where they come from, how they are checked, augmented and batched."""
