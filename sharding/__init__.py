"""The seam to torchrec: plans, collective codecs and exchange; knows ranks and tables, nothing of data."""
