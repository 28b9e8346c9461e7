"""The exception about files that contain no program; without torch, so that the command line can name it at once."""


class ModelError(ValueError):
    """A file contains no program that the target can run; the message gives the reason and the fix."""
