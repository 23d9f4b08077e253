"""The environments that come with the package."""

from __future__ import annotations

from polyturn.envs.registry import register


def register_builtin() -> None:
    """Register them; calling it again changes nothing."""
    register(
        "polyturn/TwoHopSearch-v0",
        "polyturn.envs.two_hop.env:TwoHopSearchEnv",
        description="Questions over a synthetic knowledge base that take two searches in sequence.",
    )
    register(
        "polyturn/CustomerService-v0",
        "polyturn.envs.customer_service.env:CustomerServiceEnv",
        description="A shop's agent with a policy and tools talks to a customer; records and words are checked.",
    )
