"""The exceptions that rules, builders and programs raise."""


class RuleError(Exception):
    """A rule claimed a place and then failed to rewrite it, or built something of another shape or dtype."""


class UsageError(ValueError):
    """What a caller asked for cannot be had: raised as it is, being no fault of the rule that found out."""


class NameTaken(UsageError):
    """The program has a constant under the name that a packed one would get."""


class Unmet(Exception):
    """Raised inside a require whose question cannot even be asked; its text is what was found."""
