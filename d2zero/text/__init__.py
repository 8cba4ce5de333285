"""Class embeddings: published word2vec files, files of word vectors, arrays, CLIP."""
