"""Names on the wire that the server and its clients share: those of the Open Inference Protocol, and ours."""

HEADER_LENGTH = "Inference-Header-Content-Length"
"""HTTP header: bytes of JSON in front of the binary tensors, in requests and in answers."""

OUTPUT = "probability"
"""Name of the one output, FP32 [B]."""

SHED = "X-Shed"
"""HTTP header of an answer 503: why the query was not scored, in a word."""
