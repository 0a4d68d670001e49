"""Turn published data sets into the on-disk layout of :mod:`tightrec.formats.schema`."""
