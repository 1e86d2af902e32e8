"""A plan carried out by the machines of a Ray cluster that share a file system. Ray is imported when a run asks for it."""
