"""The arithmetic of the losses in blocks, so that no temporary grows with the map."""
