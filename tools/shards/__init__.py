"""`python -m tools.shards VERB`: data sets as WebDataset shards; one file a verb."""
