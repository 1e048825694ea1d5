"""Random transformers: drawn, built, converted and compared; see `tests.test_fuzz`.

`spec` draws a description of a small vision transformer, `model`, `block`, `attention`, `special`
and `parts` build it, `check` converts it and judges the result, `reference` computes a block at
mixed granularities by hand. `python -m tests.fuzz` runs many and prints what became of them.
"""
