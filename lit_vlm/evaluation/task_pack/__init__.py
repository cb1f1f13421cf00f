"""Tasks for lmms-eval (`--include_path`) of sets that it does not have: one folder a set, with a YAML and a Python file.

The folder runs in lmms-eval's own environment, without `lit_vlm`, and can be copied elsewhere. The modules beside this
file have the scores that several sets share; `lit_vlm` itself scores with the same functions.
"""
