"""The errors that a person causes and can mend.

UserError        wrong input, option or data: one sentence, exit status 2
└── RunFailed    the run itself failed: one sentence, exit status 1
    └── Diverged     a model's answers are no numbers any more
"""


class UserError(Exception):
    """Its text names what is wrong, where, and what to do. Shown without a traceback."""

    exit_status = 2


class RunFailed(UserError):
    """The command was right but could not finish; what was finished is kept."""

    exit_status = 1


class Diverged(RunFailed):
    """Training has left the finite numbers. In a search this trial alone ends; its text says why."""
