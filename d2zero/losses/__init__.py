"""The training loss: matching, sampled points, the three terms and the unseen-constrained one."""
