"""Analysis of models.

designs          `hymba designs`: parameters, caches and FLOPs of the paper's designs
memory           `hymba memory`: the memory footprint of inference and training, nothing allocated
attention_mass   attention to meta tokens, the first token, the token itself and others; entropy
maps             attention maps, and the scan of Mamba heads as one
importance       evaluations without the attention or the SSM heads of a layer
magnitudes       outputs of both kinds of heads before and after their norms; beta vectors
receptive_field  how far back the last token's output reaches
layer_inputs     what each layer's heads see
"""
