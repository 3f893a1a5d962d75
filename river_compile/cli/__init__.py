"""The commands: thin shells around the API."""
