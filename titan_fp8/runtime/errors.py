"""The one base class of errors that a user can act on.

An entry point prints a `UserError` as one block without a traceback; every other exception is a defect of ours and
keeps its traceback. A message names what was asked, the offending value, the rule and the remedy.
"""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what, why and what to do instead."""
