"""Which models convert: `python -m dgefx.coverage` measures a list of them and writes a table.

Flow: `cases` (and one file of cases per source) -> `run` (each model in a process of its own) ->
`measure` (one model) -> `table` (Markdown and JSON). `verdict` says which refusals are right.
Nothing else of dgefx imports this package, and timm, torchvision and transformers are imported
only where one of their models is built.
"""
