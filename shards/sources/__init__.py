"""Where data sets come from: one file a family; each lists what there is, `scan` looks at every input once."""
