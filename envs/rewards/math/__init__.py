"""The verifier of mathematical answers: killable, never evaluating what a model wrote, and mostly without waiting."""

from polyturn.envs.rewards.math.verdict import Verdict
from polyturn.envs.rewards.math.verifier import MathVerifier, Mode, shared_verifier, verify

__all__ = ["MathVerifier", "Mode", "Verdict", "shared_verifier", "verify"]
