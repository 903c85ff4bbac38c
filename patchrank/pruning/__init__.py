"""Ways of pruning a tower: which tokens stay, what makes up for those that leave, and what comes out."""
