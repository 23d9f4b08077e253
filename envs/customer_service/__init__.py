"""Customer service: an agent with tools and a policy, a customer who wants something, and a shop."""
