"""Caches of deep hash embeddings."""
