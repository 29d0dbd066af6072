"""Images, masks and boxes: where they come from, how they are checked, augmented and batched."""
