"""What happened, numbered and told: the lowest room, which knows nobody above it."""
