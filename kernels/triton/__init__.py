"""Triton kernels: device code and its launch. `montessori.gpu` chooses tiles and allocates.

Nothing here imports montessori. Dimensions: B examples, T tokens, O output features, I input features,
K reference sets, V rows of a table or of the vocabulary.
"""
