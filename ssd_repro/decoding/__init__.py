"""What the paper is about: speculative decoding over any pair of sessions. Imports torch alone."""
