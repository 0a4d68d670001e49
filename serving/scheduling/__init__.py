"""Which query takes which path, and when; and the same in simulation."""
