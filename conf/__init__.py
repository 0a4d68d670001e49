"""Hydra groups, data only; a package so that Hydra can read pkg://tightrec.conf."""
