"""Accuracy of seen and unseen classes, tables, pictures."""
