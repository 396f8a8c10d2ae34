"""Probe heads on frozen features: what the papers judge an encoder by."""
