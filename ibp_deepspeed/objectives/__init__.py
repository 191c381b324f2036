"""A stage's auxiliary objective: the contract of a head, its loss, its positions, its LM head."""
