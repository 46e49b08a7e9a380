"""Enlightened networking: the network provider (VSP) and client (VSC) over a VMBus channel."""
