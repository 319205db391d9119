"""Errors of the exam that people can act on."""


class ExamError(Exception):
    """A setting, a file or a server is not usable; the message says what would be."""
