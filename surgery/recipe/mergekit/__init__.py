"""mergekit's recipe language: files with `merge_method:` are read as they are and lowered to native steps.

documents (YAML) -> config (what is said, checked) -> slices, job, lower (native steps, in a draft) -> read (graph and text).
"""
