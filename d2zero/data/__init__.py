"""Images, annotations, zero-shot splits, augmentation, and the drawn data set."""
