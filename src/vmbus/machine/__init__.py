"""Assembly: whole machines out of partitions, buses, devices and engines."""
