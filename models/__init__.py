"""DLRM-class models on torchrec modules; they know nothing of training or ranks."""
