"""`hymba report`: one HTML page about a model, which needs no network.

command    options, and the order of work
page       sections of figures and tables, and the template `page.html`
svg        matplotlib figures as SVG in the page's own colors
training   the curves of `metrics.jsonl`
results    files of `hymba evaluate --output`
analyses   the figures of `hymba_jax.analysis`
costs      parameters, memory, and the speed on this machine
"""
