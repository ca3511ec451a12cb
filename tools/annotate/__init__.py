"""`python -m tools.annotate VERB`: annotations without labels; one file a verb."""
