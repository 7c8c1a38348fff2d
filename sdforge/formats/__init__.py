"""Files that other programs write and read. Nothing here needs torch."""

READER_VERSION = 9  # raised when a reader brings the same file to other names, shapes, facts or notes
