"""One view of a run (`view`), pure decisions over it (`decide`), and the one module that acts on them (`act`)."""
