"""Operators on blocks of bytes and floats; they know devices and streams, nothing of ranks or tables."""
