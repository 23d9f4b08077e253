"""What several tests need: daemons, ranks, tiny models, hostile programs, tables of cases. No tests."""
