"""The redis-server: managed by us or attached to, and what is asked of it."""
