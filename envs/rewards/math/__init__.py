"""The verifier of mathematical answers: killable, never evaluating what a model wrote, and mostly without waiting."""

from polyturn.envs.rewards.math.verdict import Label, Unverified, Verdict, gold_texts
from polyturn.envs.rewards.math.verifier import MathVerifier, Mode, shared_verifier, unpayable_reason, verify

__all__ = [
    "Label",
    "MathVerifier",
    "Mode",
    "Unverified",
    "Verdict",
    "gold_texts",
    "shared_verifier",
    "unpayable_reason",
    "verify",
]
