"""Exported models on disk: what they say about themselves, and their vocabularies."""
