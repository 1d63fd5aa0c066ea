"""Tests of llama_dist: tiny random checkpoints, plain references, real tokenizers and one real small model."""
