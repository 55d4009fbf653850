"""Workflows with typed parameters: an uploaded graph becomes an endpoint that knows what it takes."""
