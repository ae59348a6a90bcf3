"""What reaches the learner: trees of unique tokens, and how they are laid out for its passes.

`trees` holds the data and its weights, `items` says what of a tree is forwarded and scored,
`layout` gives that as arrays in depth-first order, `planning` fills packs and balances ranks.
numpy only.
"""
