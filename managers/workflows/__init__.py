"""The durable queue: what is accepted, who is next, what became of it."""
