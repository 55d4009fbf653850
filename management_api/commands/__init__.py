"""What `management-api` can do: one module a command. Each imports what it needs when it is called."""
