"""Weights in and out: our own checkpoints, published ones, ImageNet backbones."""
