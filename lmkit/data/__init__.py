"""Corpora and what becomes of them: read, cleaned, tokenized into memory maps, cut into batches."""
