"""Operations on packed weights and on the decode step's tensors. Nothing here imports transformers."""
