"""Images with masks: loading, transforms and collation."""
