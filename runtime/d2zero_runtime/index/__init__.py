"""Indexes: images that were segmented once, to be named with any vocabulary."""
