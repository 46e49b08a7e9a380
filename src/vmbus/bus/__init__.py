"""VMBus: the control plane between a parent and a child partition, and the channels it opens."""
