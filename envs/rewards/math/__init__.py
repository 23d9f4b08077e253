"""The verifier of mathematical answers: killable, never evaluating what a model wrote, and mostly without waiting."""

from polyturn.envs.rewards.math.labels import Label, gold_texts
from polyturn.envs.rewards.math.payable import unpayable_reason
from polyturn.envs.rewards.math.verdict import Unverified, Verdict
from polyturn.envs.rewards.math.verifier import MathVerifier, Mode, shared_verifier, verify

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
