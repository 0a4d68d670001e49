"""What the server and its clients share: names on the wire (Open Inference Protocol, and ours), limits."""

HEADER_LENGTH = "Inference-Header-Content-Length"
"""HTTP header: bytes of JSON in front of the binary tensors, in requests and in answers."""

OUTPUT = "probability"
"""Name of the one output, FP32 [B]."""

SHED = "X-Shed"
"""HTTP header of an answer 503: why the query was not scored, in a word."""

MOST_TARGET_MS = 3_600_000.0
"""The largest latency target of a request: an hour."""
