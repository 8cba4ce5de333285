"""Checkpoints into models that run without torch, each verified against its checkpoint."""
