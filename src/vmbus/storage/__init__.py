"""Enlightened storage: the SCSI provider (VSP) and client (VSC) over a VMBus channel."""
