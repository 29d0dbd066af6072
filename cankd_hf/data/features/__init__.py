"""Images without labels."""
