"""Files that other programs write and read. Nothing here needs torch."""

READER_VERSION = 10  # raised when a reader brings the same file to other names, shapes, facts or notes
