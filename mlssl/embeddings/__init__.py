"""What a network gives for every image of a set, in a stream: embeddings in files, or a tagger's probabilities."""
