"""Measuring this machine: messages, sums of gradients, copies, layers, updates; what plans are priced by."""
