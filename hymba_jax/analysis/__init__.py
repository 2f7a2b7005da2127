"""Analysis of models.

designs   `hymba designs`: parameters, caches and FLOPs of the designs of the paper's comparison
memory    `hymba memory`: the memory footprint of inference and training, nothing allocated
"""
