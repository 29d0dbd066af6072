"""Images with depth maps: loading, transforms and collation."""
