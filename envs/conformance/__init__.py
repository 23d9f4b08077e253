"""The conformance kit: what every environment must do, as checks that say how to mend what they find."""

from polyturn.envs.conformance.runner import CHECKS, check_environment, run_check
from polyturn.envs.conformance.subject import Finding, Nonconforming, Subject, Unavailable

__all__ = ["CHECKS", "Finding", "Nonconforming", "Subject", "Unavailable", "check_environment", "run_check"]
