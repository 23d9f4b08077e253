"""How the policy that the demo begins with was made."""
