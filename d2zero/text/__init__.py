"""Class embeddings: word2vec files, arrays, CLIP."""
