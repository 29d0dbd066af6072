"""What the data of all tasks share: folders, tables, streams, decoding, checks."""
