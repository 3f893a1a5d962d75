"""An OpenAI-compatible server: one engine with continuous batching a replica, replicas by Ray Serve."""
