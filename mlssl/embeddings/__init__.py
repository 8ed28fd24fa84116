"""Stream the images of a set through a network: embeddings in files, or a tagger's probabilities."""
