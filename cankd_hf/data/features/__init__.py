"""Images alone."""
