"""Partitions, virtual processors, the synthetic interrupt controller and hypercalls (TLFS)."""
