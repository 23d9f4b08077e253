"""Who plays: policies, chat rendering, tool-call dialects, the token ledger and the episode loop."""
