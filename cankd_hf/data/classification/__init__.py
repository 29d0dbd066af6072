"""Images with one class each: loading, transforms and collation."""
