"""From a checked recipe to trained students in a folder."""
