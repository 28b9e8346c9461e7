"""The exceptions that rules, builders and programs raise."""


class RuleError(Exception):
    """A rule matched and then failed: it raised, or its replacement has another shape, dtype or device."""


class UsageError(ValueError):
    """The caller requests something impossible. It is not a fault of the rule that finds out, so it is not wrapped."""


class NameTaken(UsageError):
    """The program already has a constant with the name of a new packed constant."""


class Unmet(Exception):
    """A requirement cannot be evaluated, because a weight cannot be decoded. The text says what was found."""
