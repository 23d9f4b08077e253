"""What goes wrong in an environment's infrastructure, as against what a model gets wrong."""


class EnvironmentFault(RuntimeError):
    """Something behind an environment failed: a tool's backend, a grader, a sandbox. Never a reward.

    The episode is played again or dropped, and counted.
    """
