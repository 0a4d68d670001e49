"""The HTTP server and what it does with a request."""
