"""The study: what a model gains by the condition that it is given, at equal images, and where in a model groups are."""
